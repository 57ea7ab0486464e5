"""Generators that are small enough to test, and models whose graphs branch."""

import torch

from gitlight.config import ResNetConfig, ViTConfig
from gitlight.generators import GENERATORS

SMALL = {
    "mlp": {"hidden_size": 20},
    "coarse": {"hidden_size": 20, "channels": 4},
    "hybrid": {"channels": 8, "blocks": 1, "gradient_channels": 2},
}
DEEP = [ResNetConfig(width=4), ViTConfig(patch_size=4, hidden_size=12, depth=1, heads=2, mlp_size=16)]


def build(name, architecture, client_batch_size=1, **changed):
    settings = GENERATORS[name].settings(**{**SMALL.get(name, {}), **changed})
    torch.manual_seed(0)
    return GENERATORS[name].load()(architecture, settings, client_batch_size)
