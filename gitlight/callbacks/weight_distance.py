"""`WeightDistance`: how close a generator's estimates of the leaked parameters come to the true ones."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from gitlight.generators.base import ParameterEstimate


class WeightDistance(Callback):
    """Logs the distance between estimated and true leaked parameters at each validation's end.

    The generator never sees a weight; only this measurement does. Per parameter ``weight_distance/NAME`` and
    ``weight_distance/NAME_relative``; over all estimated parameters ``weight_distance/total`` and
    ``weight_distance/total_relative``. Silent for generators that estimate no parameter.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log; every rank holds the same estimates, so that there is nothing to communicate."""
        if trainer.sanity_checking:
            return
        estimates: dict[str, ParameterEstimate] = pl_module.generator.estimated_parameters()  # type: ignore[union-attr, operator]
        if not estimates:
            return
        network: nn.Module = trainer.datamodule.leaked_model.network  # type: ignore[attr-defined]
        for name, value in weight_distances(estimates, dict(network.named_parameters())).items():
            pl_module.log(f"weight_distance/{name}", value, sync_dist=True)


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
