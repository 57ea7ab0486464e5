"""Captured gradients against autograd's, once before they are relied on.

A graph of `torch.export` is the forward pass. It does not say how a user's own `autograd.Function` goes backward, that
a region is computed under ``torch.no_grad``, or what a hook does to a gradient; and it is run on the images of many
leaks at once, which a model may treat otherwise than those of one. All of that shows in the gradients: in float64,
where rounding hides nothing, and of weights that lie beside the model's own, whose zeros hide what is behind them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gitlight.architecture import Architecture
from gitlight.data.pair import Gradients
from gitlight.errors import ArchitectureError, first_line
from gitlight.exported import copied
from gitlight.gradients.captured import CapturedGradients
from gitlight.gradients.functional import functional
from gitlight.gradients.functional_gradients import gradient_by_autograd
from gitlight.gradients.layer_gradients import NoRuleError
from gitlight.gradients.precision import plain_tensor

_TOLERANCE = {torch.float32: 0.1, torch.float64: 1e-6}
"""Of the norm of a parameter's gradient. ReLUs that rounding switches make up to 9e-4 in ResNet-50, and 5e-4 in what
autograd itself makes of it (docs/gradients.md); in VGG-11 a single one makes 1.4 % of the first bias' gradient."""

_NOISE = 1e-4
"""The same, of the largest norm: for gradients that are zero but for rounding, as of a key's bias."""

_OF_LIBRARIES = "GeneratedBackwardFor_"
"""What torch.library calls the backward pass of an operation registered with it, which a graph holds as it is."""

_SHAKEN, _OF_ZEROS = 0.1, 0.02
"""How far weights are moved: of their root mean square, and those that are all zero."""

_LARGE, _EVERY = 65536, 101
"""Of parameters with more entries one in so many is compared; no common size divides by it."""


def check_against_autograd(
    captured: CapturedGradients,
    network: nn.Module,
    architecture: Architecture,
    like: Tensor,
    images_per_leak: int,
    shaken: bool = False,
) -> None:
    """Make the gradients of two leaks both ways.

    Args:
        captured: made for the network in its present mode.
        network: the leaked network.
        architecture: its architecture.
        like: any tensor of the device and precision of the images.
        images_per_leak: ``N``.
        shaken: whether to move the weights at random first; they are left where they are, if there is no finite
            gradient beside them.

    Raises:
        NoRuleError: they differ, and the message names the parameter; or autograd cannot make them.
    """
    try:
        # What the forward pass leaves in the model's attributes, or tells those who watch it, is not of this.
        twin = copied(network, [*network.parameters(), *network.buffers()])
    except ArchitectureError as error:
        raise NoRuleError(str(error)) from error
    shapes = architecture.parameter_shapes
    parameters = {name: plain_tensor(tensor, like.dtype).to(like.device) for name, tensor in network.named_parameters()}
    others = {name: plain_tensor(tensor, like.dtype).to(like.device) for name, tensor in network.named_buffers()}
    others |= {name: parameters.pop(name) for name in set(parameters) - set(shapes)}
    images, labels = _examples(architecture, like, images_per_leak)
    _check_no_own_backward(twin, parameters, others, images[0])

    def by_autograd(parameters: Gradients) -> list[Gradients]:
        found = []
        for leak in zip(images, labels, strict=True):
            with _of_the_model():
                gradients = gradient_by_autograd(twin, parameters, others, *leak)
            found.append({name: _picked(g[None])[0] if g.numel() > _LARGE else g for name, g in gradients.items()})
        return found

    moved = _shaken(parameters) if shaken else parameters
    wanted = by_autograd(moved)
    if shaken and not all(bool(torch.isfinite(one).all()) for leak in wanted for one in leak.values()):
        moved, wanted = parameters, by_autograd(parameters)
    reductions = {name: _picked for name, shape in shapes.items() if shape.numel() > _LARGE}
    made = {
        name: like.new_empty(len(images), *([len(range(0, shape.numel(), _EVERY))] if name in reductions else shape))
        for name, shape in shapes.items()
    }
    with _of_the_graph():
        captured(captured.prepare({**moved, **others}), images.clone(), labels, made, reductions)
    for number, leak in enumerate(wanted):
        _compare({name: gradient[number] for name, gradient in made.items()}, leak)


def _shaken(parameters: Gradients) -> Gradients:
    generator, found = torch.Generator().manual_seed(0), {}
    for name, value in parameters.items():
        size = float(value.square().mean().sqrt()) if value.is_floating_point() and value.numel() else 0.0
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        found[name] = value + (noise * (_SHAKEN * size or _OF_ZEROS)).to(value)
    return found


@contextmanager
def _of_the_graph() -> Iterator[None]:
    try:
        yield
    except (NoRuleError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an operation of the graph, on tensors of another precision
        raise NoRuleError(f"its graph does not run: {first_line(error)}") from error


@contextmanager
def _of_the_model() -> Iterator[None]:
    try:
        yield
    except (NoRuleError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the user's modules raise
        raise NoRuleError(f"autograd does not differentiate it: {first_line(error)}") from error


def _check_no_own_backward(network: nn.Module, parameters: Gradients, others: Gradients, images: Tensor) -> None:
    """Refuse a model with an `autograd.Function` of its own: on other values it may do something else."""
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    others = {name: value.clone() for name, value in others.items()}
    with _of_the_model():
        logits = functional(network)(leaves | others, images.clone())
    seen: set[Any] = set()
    nodes = [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not kind.startswith(_OF_LIBRARIES):
            kind = kind.removesuffix("Backward")
            raise NoRuleError(f"a graph of torch.export does not hold the backward pass of {kind}, which autograd runs")
        nodes += [following for following, _ in node.next_functions]


def _compare(made: Gradients, wanted: Gradients) -> None:
    largest = max(float(w.norm()) for w in wanted.values())
    shares = {}
    for name, gradient in made.items():
        size = float(wanted[name].norm()) + _NOISE * largest
        difference = float((gradient - wanted[name]).norm())
        # What is not finite on either side is refused, too.
        shares[name] = (difference / size if size else 0.0) if max(difference, size) < torch.inf else torch.inf
    name = max(shares, key=lambda name: shares[name])
    if shares[name] > _TOLERANCE[made[name].dtype]:
        raise NoRuleError(
            f"its graph does not give autograd's gradients: of {name}, with a norm of {wanted[name].norm():.2g}, they "
            f"differ by {(made[name] - wanted[name]).norm():.2g}. What a graph of torch.export leaves out can be the "
            "cause, such as torch.no_grad() or a hook that changes values; or what depends on other images"
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
