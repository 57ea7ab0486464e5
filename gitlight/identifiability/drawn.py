"""Leaks of random images from a network with random weights: all results and every ``δ``, by autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from gitlight.architecture import IMAGE, Architecture, Layer
from gitlight.errors import ArchitectureError

N_IMAGES = 3
_LARGE = 20_000_000
"""Parameters from which one image has to do: a backward pass in float64 then takes many seconds."""


@dataclass(frozen=True)
class DrawnLeak:
    """What happens in the leaked model at one image; all in float64.

    Attributes:
        values: name of a layer, or `IMAGE` → its result, ``(1, *output_shape)``.
        deltas: name of a layer → ``∂L/∂result``, the same shape; zero where nothing flows back.
        gradient_size: root mean square of the entries of the gradient that leaks.
        weights: name → value of parameters and buffers.
    """

    values: dict[str, Tensor]
    deltas: dict[str, Tensor]
    gradient_size: float
    weights: dict[str, Tensor]


def draw_leaks(network: nn.Module, architecture: Architecture) -> list[DrawnLeak]:
    """Leaks of smooth random images with random labels, the same at every call; one for a large network.

    Raises:
        ArchitectureError: an operation cannot be repeated layer by layer.
    """
    weights = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    count = 1 if architecture.n_parameters > _LARGE else N_IMAGES
    generator = torch.Generator().manual_seed(0)
    images = smooth_images(count, architecture.image_shape, generator)
    labels = torch.randint(architecture.n_classes, (count,), generator=generator)
    return [_leak(architecture, weights, image, label) for image, label in zip(images, labels, strict=True)]


def smooth_images(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Images that, like photographs, vary more over large distances than over small ones: ``(count, *shape)``."""
    coarse = torch.rand(count, shape[0], 5, 5, generator=generator, dtype=torch.float64)
    fine = interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False)
    return (fine + 0.05 * torch.randn(count, *shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


def _leak(architecture: Architecture, weights: dict[str, Tensor], image: Tensor, label: Tensor) -> DrawnLeak:
    leaves = {name: weights[name].clone().requires_grad_() for name in architecture.parameter_shapes}
    given = weights | leaves
    values = {IMAGE: image.unsqueeze(0).requires_grad_()}
    for layer in architecture.layers:
        values[layer.name] = _apply(layer, [values[name] for name in layer.inputs], given)
    loss = cross_entropy(values[architecture.output], label.unsqueeze(0))
    differentiable = {name: value for name, value in values.items() if value.requires_grad}
    wanted = [*differentiable.values(), *leaves.values()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    gradients = [g for g in found[len(differentiable) :] if g is not None]
    size = (sum(float(g.square().sum()) for g in gradients) / architecture.n_parameters) ** 0.5
    flowing = dict(zip(differentiable, found, strict=False))
    deltas, results = {}, {}
    for name, value in values.items():
        delta = flowing.get(name)
        shape = architecture.image_shape if name == IMAGE else architecture[name].output_shape
        results[name] = value.detach().reshape(1, *shape)
        deltas[name] = torch.zeros_like(results[name]) if delta is None else delta.reshape(1, *shape)
    return DrawnLeak(results, deltas, size, weights)


def _apply(layer: Layer, inputs: list[Tensor], weights: dict[str, Tensor]) -> Tensor:
    missing = [name for name in layer.constants.values() if name not in weights]
    if missing or not hasattr(layer.operation, "_schema"):
        what = f"computes with the constant {missing[0]}" if missing else "picks one of several results"
        raise ArchitectureError(f"{layer.place} {what}: the identifiability report cannot repeat that operation.")
    return layer.apply(inputs, weights)
