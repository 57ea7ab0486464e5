"""torchvision's normalisation as a first layer, in a form that can be traced."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import Normalize
from torchvision.transforms.v2 import Normalize as NormalizeV2


class ChannelNormalisation(nn.Module):
    """``(x − mean) / std`` of each channel; what torchvision's ``Normalize`` computes, without looking at values.

    That one asks whether any deviation is zero, which ``torch.export`` and ``vmap`` cannot follow.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # No part of the state dict, as torchvision's is not.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        return (images - self.mean) / self.std


def replace_normalize(network: nn.Module) -> None:
    """Puts a `ChannelNormalisation` in the place of each ``Normalize`` that is a module of the network.

    Not of a subclass, which may do more.
    """
    for module in list(network.modules()):
        # Not `named_children`, which gives a module that has two names under one of them.
        for name, child in module._modules.items():
            if not isinstance(child, Normalize | NormalizeV2) or type(child) not in (Normalize, NormalizeV2):
                continue
            if all(child.std):
                setattr(module, name, ChannelNormalisation(list(child.mean), list(child.std)))
