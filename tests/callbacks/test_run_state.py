import random
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_run import Fit

from gitlight.callbacks.run_state import RANDOM_STATES, RunState, random_state, set_random_state
from gitlight.checkpoint_io import AtomicCheckpointIO

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))


def test_random_numbers_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    draw()  # leaves half a pair of normal numbers behind
    AtomicCheckpointIO().save_checkpoint(random_state(CPU), tmp_path / "state.ckpt")
    expected = draw(), draw()
    set_random_state(AtomicCheckpointIO().load_checkpoint(tmp_path / "state.ckpt"), CPU)
    assert (draw(), draw()) == expected


class FirstNumbers(Callback):
    """Draws at the beginning of training."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.drawn = torch.rand(3)


def test_a_run_seeds_them_and_a_resumed_one_finds_them(fit: Fit, tmp_path: Path) -> None:
    def first_numbers(seed: int, resume: str | None = None) -> torch.Tensor:
        numbers = FirstNumbers()
        trainer = fit([RunState(seed), numbers], max_epochs=1 if resume is None else 2, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return numbers.drawn

    first = first_numbers(seed=5)
    assert torch.equal(first_numbers(seed=5), first)
    assert not torch.equal(first_numbers(seed=6), first)
    (state,) = torch.load(tmp_path / "run.ckpt", weights_only=True)[RANDOM_STATES]
    torch.set_rng_state(state["torch"])
    expected = torch.rand(3)
    assert torch.equal(first_numbers(seed=6, resume=str(tmp_path / "run.ckpt")), expected)
