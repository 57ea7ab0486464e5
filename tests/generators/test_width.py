import pytest
from torch import nn

from gitlight.errors import ConfigError
from gitlight.generators.width import n_trainable, width_for_budget


@pytest.mark.parametrize("budget", [1000, 4321, 100_000, 10_000_000])
def test_the_width_is_the_largest_within_the_budget(budget):
    def build(width):
        return nn.Sequential(nn.Linear(30, width), nn.Linear(width, width), nn.Linear(width, 20))

    width = width_for_budget(build, budget)
    assert n_trainable(build(width)) <= budget < n_trainable(build(width + 1))


def test_an_impossible_budget_names_the_least():
    with pytest.raises(ConfigError, match=r"generator.parameters: 5 is too few.*11 parameters"):
        width_for_budget(lambda width: nn.Linear(10, width), 5)
