from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from gitlight.config import OptimizerConfig
from gitlight.optimization import configure_optimizer, learning_rate_factor


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_schedules_warm_up_and_never_exceed_the_peak(schedule):
    settings = OptimizerConfig(schedule=schedule, warmup_fraction=0.1)
    factors = [learning_rate_factor(settings, step / 100) for step in range(101)]
    assert 0 < factors[0] < factors[5] < factors[10] == 1.0
    assert max(factors) == 1.0


def test_step_drops_tenfold_at_three_quarters():
    settings = OptimizerConfig(schedule="step", warmup_fraction=0)
    assert [learning_rate_factor(settings, t) for t in (0, 0.7499, 0.75, 1)] == [1.0, 1.0, 0.1, 0.1]


def test_warm_up_may_be_the_whole_run_or_none():
    assert learning_rate_factor(OptimizerConfig(warmup_fraction=1.0), 0.5) == 0.5
    assert learning_rate_factor(OptimizerConfig(warmup_fraction=0.0), 0.0) == 1.0


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize(
    ("precision", "clip", "fused"),
    [("32-true", 1.0, True), ("16-mixed", None, True), ("16-mixed", 1.0, False), ("bf16-mixed", 1.0, False)],
)
def test_optimisers_are_fused_but_where_lightning_scales_and_clips(name, precision, clip, fused):
    module = nn.Linear(2, 2)
    trainer = SimpleNamespace(
        precision=precision, gradient_clip_val=clip, estimated_stepping_batches=3, strategy=DDPStrategy()
    )
    module.trainer = trainer
    made = configure_optimizer(module, OptimizerConfig(name=name))["optimizer"]
    assert [group["fused"] for group in made.param_groups] == [fused]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_epsilon_is_the_optimisers(name):
    module = nn.Linear(2, 2)
    module.trainer = SimpleNamespace(
        precision="32-true", gradient_clip_val=None, estimated_stepping_batches=3, strategy=DDPStrategy()
    )
    made = configure_optimizer(module, OptimizerConfig(name=name, epsilon=1e-6))["optimizer"]
    assert [group["eps"] for group in made.param_groups] == [1e-6]
