"""Optimisers and learning-rate schedules, from `OptimizerConfig`."""

import math
from typing import Any

import torch
from lightning import LightningModule

from gitlight.config import OptimizerConfig
from gitlight.sharding import FullyShardedStrategy

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def configure_optimizer(module: LightningModule, settings: OptimizerConfig) -> Any:
    """What ``LightningModule.configure_optimizers`` returns: the optimiser, and its schedule stepped every batch.

    Returns None for a module without trainable parameters (a generator in closed form).
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        return None
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.name == "sgd":
        options["momentum"] = settings.momentum
    else:
        # By default tiny: started in closed form, losses are 1e-4 and less, and inner gradients far below 1e-8.
        options["eps"] = settings.epsilon
    # One kernel for all parameters. Loss scaling is then the kernel's, which leaves no place for Lightning to clip.
    # It asks no further than whether precision is mixed.
    mixed_and_clipped = module.trainer.precision.endswith("-mixed") and module.trainer.gradient_clip_val
    options["fused"] = not mixed_and_clipped
    if settings.name == "sgd" and isinstance(module.trainer.strategy, FullyShardedStrategy):
        options["fused"] = False  # PyTorch's fused SGD, unlike its Adam, does not know sharded parameters
    optimizer = _OPTIMIZERS[settings.name](parameters, **options)
    n_steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(settings, step / max(1, n_steps))
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}


def learning_rate_factor(settings: OptimizerConfig, progress: float) -> float:
    """The learning rate over its peak, at ``progress`` in [0, 1] through the run.

    >>> settings = OptimizerConfig(schedule="cosine", warmup_fraction=0.1)
    >>> [round(learning_rate_factor(settings, t), 3) for t in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    warmup = settings.warmup_fraction
    if progress < warmup:
        # The first step, at progress 0, must move: half a step's worth of warm-up is as good as none.
        return max(progress / warmup, 1e-3)
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "step":
        return 1.0 if progress < 0.75 else 0.1
    remaining = (progress - warmup) / max(1e-12, 1 - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, remaining)))
