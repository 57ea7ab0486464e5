import pytest
from tiny_run import Fit, TinyData, batches

from gitlight.callbacks.max_time import MaxTime


def test_a_run_ends_between_two_optimiser_steps(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, *(9.0 for _ in range(100))))  # over after the start
    monkeypatch.setattr(MaxTime, "time_elapsed", lambda self, stage="train": next(times))
    data = TinyData(batches(*(4 for _ in range(10))), batches(3))
    trainer = fit([MaxTime("00:00:00:05")], data=data, accumulate_grad_batches=4)
    assert (trainer.global_step, trainer.fit_loop.batch_idx) == (1, 3)
