"""`RunState`: what Lightning leaves out of a checkpoint, and a run needs to go on as if it had never stopped."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from gitlight.data.sampling import mixed_seed
from gitlight.runs import FORMAT, VERSION, WANDB_ID

RANDOM_STATES = "random_states"


class RunState(Callback):
    """Adds to every checkpoint its format's version, the W&B run's id, and every rank's random states.

    What the project draws itself is seeded by what it is for, and needs none of the latter; a layer such as dropout
    draws from the process's own random numbers. They are seeded here at the start of a run, differently on each rank. A
    run that goes on with the same number of ranks finds its states again; with another number all are seeded afresh.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._wandb_id: str | None = None
        self._resumed: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """All ranks come here, though one writes."""
        checkpoint[FORMAT] = VERSION
        # A run that goes on for a while without W&B is still the one there.
        current = (one.version for one in trainer.loggers if isinstance(one, WandbLogger))
        checkpoint[WANDB_ID] = next(current, self._wandb_id)
        own = random_state(trainer.strategy.root_device)
        states = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, own)
        checkpoint[RANDOM_STATES] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The random states are set in `on_train_start`, after all that may draw before."""
        self._wandb_id = checkpoint.get(WANDB_ID)
        self._resumed = checkpoint.get(RANDOM_STATES, [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the process's random numbers, or go on with those of the checkpoint."""
        rank = trainer.global_rank
        if len(self._resumed) == trainer.world_size:
            set_random_state(self._resumed[rank], trainer.strategy.root_device)
            return
        seed = mixed_seed("process", self._seed, rank, trainer.global_step)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's, PyTorch's and a GPU's random numbers, as tensors and plain values."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        # Checkpoints hold no arrays.
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from a `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
