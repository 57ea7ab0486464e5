"""Which layers are compiled or laid out channels last, and that checkpoints stay as they are."""

import copy

import pytest
import torch
from torch import nn

from gitlight.config import TrainerConfig
from gitlight.errors import ConfigError
from gitlight.speed import speed_up


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.closed_form = nn.Linear(3, 3).double()
        self.steps = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)])
        self.norm = nn.BatchNorm2d(3, affine=False)

    def forward(self, x):
        for step in self.steps:
            x = step(x).sigmoid()
        return self.norm(x)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Generator()


def test_results_differ_by_rounding_and_names_do_not(plain, monkeypatch):
    fast, images = copy.deepcopy(plain), torch.rand(2, 3, 8, 8)
    speed_up(fast, TrainerConfig(channels_last=True))
    torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-5)
    speed_up(
        fast, TrainerConfig(compile=True)
    )  # it takes place when a layer is called, and longer than all these tests
    assert list(fast.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fast.state_dict())


def test_only_what_is_trained_in_single_precision_is_changed(plain):
    speed_up(plain, TrainerConfig(channels_last=True, compile=True))
    assert plain.steps[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [m for m in plain.modules() if m._compiled_call_impl is not None] == list(plain.steps)


@pytest.mark.parametrize("key", ["compile", "channels_last"])
def test_closed_forms_are_refused(key):
    module = nn.Sequential(nn.Linear(3, 3).double(), nn.ReLU())
    with pytest.raises(ConfigError, match=rf"trainer.{key}: Sequential has no layers that are trained"):
        speed_up(module, TrainerConfig(**{key: True}))


def test_nothing_is_changed_where_nothing_is_asked_for():
    speed_up(nn.Sequential(), TrainerConfig())
