"""The leaked model's own forward and backward pass, with estimated weights."""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gitlight.architecture import IMAGE, Architecture
from gitlight.data.pair import Gradients, as_rows
from gitlight.generators.exact.rule import Weights


def computable(architecture: Architecture, weights: Collection[str]) -> set[str]:
    """Names of the results that follow from an image with these weights and no other: those of `forward_values`."""
    found = {IMAGE}
    for layer in architecture.layers:
        needed = (*layer.parameters.values(), *layer.constants.values())
        if all(name in weights for name in needed) and all(name in found for name in layer.inputs):
            found.add(layer.name)
    return found


def forward_values(architecture: Architecture, images: Tensor, weights: Weights) -> dict[str, Tensor]:
    """The results of all layers for which the weights are known, from the image up.

    Args:
        architecture: the leaked model's.
        images: ``(B, C, H, W)``.
        weights: estimates of leaked parameters; layers that need others, and what follows from them, are left out.

    Returns:
        name of the layer, or `IMAGE` → ``(B, *output_shape)`` float64.
    """

    def of_one(image: Tensor) -> dict[str, Tensor]:
        results = architecture.results(image, weights)
        found = {IMAGE: image}
        for layer in architecture.layers:
            result = results.get(layer.name)
            # What follows an operation with several results no walk asks for.
            if isinstance(result, Tensor) and all(name in found for name in layer.inputs):
                found[layer.name] = result.reshape(layer.output_shape)
        return found

    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernel of CPUs
        values: dict[str, Tensor] = torch.func.vmap(of_one)(images.double())
    return values


def gradient_mismatch(
    architecture: Architecture, images: Tensor, labels: Tensor, gradients: Gradients, weights: Weights
) -> Tensor:
    """How far the gradients that images would give, with estimated weights, are from those that leaked.

    Args:
        architecture: the leaked model's.
        images: ``(B, C, H, W)``.
        labels: ``(B,)`` int64.
        gradients: of ``B`` leaks, in float64.
        weights: estimates of all leaked parameters.

    Returns:
        ``(B,)``: the distance over the norm of the leak, all parameters together.
    """
    made = model_gradients(architecture, images, labels, weights)
    names = list(architecture.parameter_shapes)
    distance = sum(as_rows(made[name] - gradients[name]).square().sum(dim=1) for name in names)
    size = sum(as_rows(gradients[name]).square().sum(dim=1) for name in names)
    assert isinstance(distance, Tensor)
    assert isinstance(size, Tensor)
    return (distance / size.clamp_min(1e-300)).sqrt()


def model_gradients(architecture: Architecture, images: Tensor, labels: Tensor, weights: Weights) -> Gradients:
    """The gradients of the cross-entropy at images, with estimated weights; differentiable in the weights.

    Args:
        architecture: the leaked model's.
        images: ``(B, C, H, W)`` float64.
        labels: ``(B,)`` int64.
        weights: estimates of all leaked parameters.

    Returns:
        name → ``(B, *shape)``.
    """

    def loss(parameters: Weights, image: Tensor, label: Tensor) -> Tensor:
        logits = architecture.results(image, parameters)[architecture.output]
        return torch.nn.functional.cross_entropy(logits, label.unsqueeze(0))

    parameters = {name: weights[name] for name in architecture.parameter_shapes}
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images.double(), labels)
