"""Which GPUs each worker's trials use, so that trials at the same time do not all take the first."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from gitlight.config import TrainerConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them: by number, UUID or MIG name."""
    import torch

    count = torch.cuda.device_count()
    if VISIBLE in environment:
        named = [name.strip() for name in environment[VISIBLE].split(",") if name.strip()]
        # Of parts of GPUs a process sees the first alone.
        return named if named and named[0].startswith("MIG-") else named[:count]
    return [str(number) for number in range(count)]


def gpus_of_worker(visible: Sequence[str], worker: int, workers: int, devices: Any) -> list[str]:
    """A worker's own GPUs, as many for each worker.

    Args:
        visible: all GPUs there are.
        worker: which worker, in ``range(workers)``.
        workers: trials at a time.
        devices: ``trainer.devices``. A number is how many GPUs a trial takes, and a list says itself which ones; for
            ``auto`` the GPUs are divided among workers, and what is left over stays idle.

    Returns:
        Names from ``visible``. If there are not enough for all workers, some share theirs.

    >>> [gpus_of_worker("01234", worker, 2, "auto") for worker in range(2)]
    [['0', '1'], ['2', '3']]
    >>> [gpus_of_worker("01", worker, 3, 1) for worker in range(3)]
    [['0'], ['1'], ['0']]
    """
    if str(devices) in ("auto", "-1"):
        share = max(1, len(visible) // workers)
    elif str(devices).isdigit():
        share = int(devices)
    else:
        return list(visible)
    if share >= len(visible):  # Lightning refuses to take more than all
        return list(visible)
    start = worker * max(share, len(visible) // workers)  # in a block of its own, where trials differ in their shares
    return [visible[(start + number) % len(visible)] for number in range(share)]


def gpus_of_trial(visible: Sequence[str], worker: int, workers: int, settings: TrainerConfig) -> list[str]:
    """The GPUs that a trial is to be confined to; empty: to none in particular.

    Args:
        visible: all GPUs there are.
        worker: the worker that runs it, in ``range(workers)``.
        workers: trials at a time.
        settings: the trial's.
    """
    if workers == 1 or not visible or settings.accelerator == "cpu":
        return []
    own = gpus_of_worker(visible, worker, workers, settings.devices)
    return [] if own == list(visible) else own
