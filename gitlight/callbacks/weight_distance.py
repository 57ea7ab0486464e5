"""`WeightDistance`: how close a generator's estimates of the leaked parameters come to the true ones."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from gitlight.callbacks.weight_distance_curves import WeightDistancePoint, draw_weight_distances
from gitlight.generators.base import ParameterEstimate


class WeightDistance(Callback):
    """Logs the distance between estimated and true leaked parameters, and draws its curves.

    The generator never sees a weight; only this measurement does. Per parameter ``weight_distance/NAME`` and
    ``weight_distance/NAME_relative``; over all estimated parameters ``weight_distance/total`` and
    ``weight_distance/total_relative``. Measured before the first step, after the closed-form fits, and at each
    validation's end, when ``weight_distance.png`` is drawn again with the validation's MSE beside the distances.
    Silent for generators that estimate no parameter.

    Args:
        output_dir: the run's folder.

    Attributes:
        history: what was measured so far; kept in checkpoints, so that a resumed run continues its curves.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = Path(output_dir) / "weight_distance.png"
        self.history: list[WeightDistancePoint] = []
        self._distances: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain values."""
        return {"history": [asdict(point) for point in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of a checkpoint."""
        self.history = [WeightDistancePoint(**point) for point in state_dict["history"]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure where the curves start; a resumed run has done so already."""
        if trainer.global_step > 0:
            return
        distances = _measure(trainer, pl_module)
        if not distances:
            return
        self.history = [WeightDistancePoint(0, distances)]
        # `log` would hold the values back until the first epoch's end, and then log them as of that step.
        row = {"epoch": trainer.current_epoch, **_logged(distances)}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=0)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log; every rank holds the same estimates, so that there is nothing to communicate."""
        self._distances = {} if trainer.sanity_checking else _measure(trainer, pl_module)
        for name, value in _logged(self._distances).items():
            pl_module.log(name, value, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add to the history, with the MSE that `ReconstructionMetrics` has logged by now, and draw it."""
        if not self._distances:
            return
        mse = trainer.callback_metrics.get("val/mse")
        self.history.append(
            WeightDistancePoint(trainer.global_step, self._distances, None if mse is None else float(mse))
        )
        if trainer.is_global_zero:
            draw_weight_distances(self.history, self.path)


def _measure(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    estimates: dict[str, ParameterEstimate] = pl_module.generator.estimated_parameters()  # type: ignore[union-attr, operator]
    if not estimates:
        return {}
    network: nn.Module = trainer.datamodule.leaked_model.network  # type: ignore[attr-defined]
    return weight_distances(estimates, dict(network.named_parameters()))


def _logged(distances: Mapping[str, float]) -> dict[str, float]:
    return {f"weight_distance/{name}": value for name, value in distances.items()}


def weight_distances(estimates: Mapping[str, ParameterEstimate], parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Distances between estimated and true parameters, in float64.

    The distance is the Euclidean norm of the difference; relative, it is divided by the norm of the true parameter.
    Where only differences between rows are determined, both are centred over the rows first.

    Args:
        estimates: name → estimate; may cover a part of the parameters.
        parameters: name → true parameter.

    Returns:
        ``NAME`` and ``NAME_relative`` for each estimate, ``total`` and ``total_relative`` over all of them.

    Raises:
        KeyError: an estimate's name is not that of a parameter.
        ValueError: an estimate's shape is not its parameter's.
    """
    distances: dict[str, float] = {}
    squared_distance = squared_norm = 0.0
    for name, estimate in estimates.items():
        truth = _float64(parameters[name])
        value = _float64(estimate.value)
        if value.shape != truth.shape:
            raise ValueError(f"The estimate of {name} has shape {tuple(value.shape)}, not {tuple(truth.shape)}.")
        if estimate.up_to_common_row:
            truth, value = truth - truth.mean(dim=0), value - value.mean(dim=0)
        distance, norm = float((value - truth).norm()), float(truth.norm())
        distances |= _entries(name, distance, norm)
        squared_distance += distance**2
        squared_norm += norm**2
    return distances | _entries("total", math.sqrt(squared_distance), math.sqrt(squared_norm))


def _entries(name: str, distance: float, norm: float) -> dict[str, float]:
    relative = distance / norm if norm > 0 else (0.0 if distance == 0 else math.inf)
    return {name: distance, f"{name}_relative": relative}


def _float64(tensor: Tensor) -> Tensor:
    # Some devices have no float64.
    return tensor.detach().cpu().to(torch.float64)
