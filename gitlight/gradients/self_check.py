"""Captured gradients against autograd's, once before they are relied on.

A graph of `torch.export` is the forward pass. It does not say how a user's own `autograd.Function` goes backward, that
a region is computed under ``torch.no_grad``, or what a hook does to a gradient; and it is run on the images of many
leaks at once, which a model may treat otherwise than those of one. All of that shows in the gradients.
"""

import torch
from torch import Tensor, nn

from gitlight.architecture import Architecture
from gitlight.data.pair import Gradients
from gitlight.errors import first_line
from gitlight.gradients.captured import CapturedGradients
from gitlight.gradients.functional_gradients import gradient_by_autograd
from gitlight.gradients.layer_gradients import NoRuleError

_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
"""Of the norm of a parameter's gradient. ReLUs that rounding switches make up to 9e-4 in ResNet-50, and 5e-4 in what
autograd itself makes of it (docs/gradients.md)."""

_NOISE = 1e-4
"""The same, of the largest norm: for gradients that are zero but for rounding, as of a key's bias."""

_LARGE, _EVERY = 65536, 101
"""Of parameters with more entries one in so many is compared; no common size divides by it."""


def check_against_autograd(
    captured: CapturedGradients, network: nn.Module, architecture: Architecture, like: Tensor, images_per_leak: int
) -> None:
    """Make the gradients of two leaks both ways.

    Args:
        captured: made for the network in its present mode.
        network: the leaked network.
        architecture: its architecture.
        like: any tensor of the device and precision of the images.
        images_per_leak: ``N``.

    Raises:
        NoRuleError: they differ, or autograd cannot make them; the message names the parameter.
    """
    shapes = architecture.parameter_shapes
    parameters = {name: _cast(tensor, like) for name, tensor in network.named_parameters()}
    others = {name: _cast(tensor, like) for name, tensor in network.named_buffers()}
    others |= {name: parameters.pop(name) for name in set(parameters) - set(shapes)}
    reductions = {name: _picked for name, shape in shapes.items() if shape.numel() > _LARGE}
    images, labels = _examples(architecture, like, images_per_leak)
    made = {
        name: like.new_empty(len(images), *([len(range(0, shape.numel(), _EVERY))] if name in reductions else shape))
        for name, shape in shapes.items()
    }
    captured(captured.prepare({**parameters, **others}), images.clone(), labels, made, reductions)
    for number in range(len(images)):
        try:
            wanted = gradient_by_autograd(network, parameters, others, images[number], labels[number])
        except Exception as error:  # the model's own
            raise NoRuleError(f"autograd does not differentiate it: {first_line(error)}") from error
        _compare({name: gradient[number] for name, gradient in made.items()}, wanted)


def _compare(made: Gradients, wanted: Gradients) -> None:
    wanted = {name: _picked(w[None])[0] if w.numel() > _LARGE else w for name, w in wanted.items()}
    if not all(w.isfinite().all() for w in wanted.values()):
        return  # there is nothing to compare with, nor to invert
    largest = max(float(w.norm()) for w in wanted.values())
    for name, gradient in made.items():
        norm = float(wanted[name].norm())
        difference = float((gradient - wanted[name]).norm())
        if not difference <= _TOLERANCE[gradient.dtype] * (norm + _NOISE * largest):
            raise NoRuleError(
                f"its graph does not give autograd's gradients: of {name}, with a norm of {norm:.2g}, they differ by "
                f"{difference:.2g}. What a graph of torch.export leaves out can be the cause: a backward pass of one's "
                "own, torch.no_grad(), a hook that changes values; or what depends on other images"
            )


def _examples(architecture: Architecture, like: Tensor, images_per_leak: int) -> tuple[Tensor, Tensor]:
    """Random images of two leaks, ``(2, N, C, H, W)``, each of a brightness of its own, and labels."""
    generator = torch.Generator().manual_seed(0)
    count = 2 * images_per_leak
    images = torch.rand(count, *architecture.image_shape, generator=generator, dtype=like.dtype)
    images *= torch.linspace(1, 1 / count, count, dtype=like.dtype).view(-1, 1, 1, 1)
    labels = torch.arange(count) % architecture.n_classes
    return images.to(like.device).unflatten(0, (2, -1)), labels.to(like.device).unflatten(0, (2, -1))


def _picked(gradients: Tensor) -> Tensor:
    return gradients.flatten(1)[:, ::_EVERY]


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().to(like) if tensor.is_floating_point() else tensor.detach()
