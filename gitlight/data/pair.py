"""`GradientPair`: what a generator is trained on."""

from dataclasses import dataclass

from torch import Tensor

Gradients = dict[str, Tensor]
"""Parameter name → ``(B, *parameter.shape)``, in the order of ``leaked_model.named_parameters()``."""


def as_rows(gradient: Tensor) -> Tensor:
    """One parameter's gradients ``(B, *shape)`` as ``(B, entries)``; of a parameter that is one number, ``(B, 1)``.

    >>> import torch
    >>> as_rows(torch.zeros(5, 3, 4)).shape, as_rows(torch.zeros(5)).shape, as_rows(torch.zeros(0, 3, 4)).shape
    (torch.Size([5, 12]), torch.Size([5, 1]), torch.Size([0, 12]))
    """
    return gradient.reshape(len(gradient), gradient.shape[1:].numel())


@dataclass(frozen=True)
class GradientPair:
    """``B`` leaks and the images behind them.

    Attributes:
        gradients: parameter name → ``(B, *parameter.shape)``: one gradient per client batch, averaged over its
            ``N`` images, as it reaches the attacker (after the channel).
        images: ``(B, N, C, H, W)`` in [0, 1].
        labels: ``(B, N)`` int64.
        indices: ``(B, N)`` int64, each image's position in its split.
    """

    gradients: Gradients
    images: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.images)
