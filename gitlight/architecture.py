"""`Architecture`: the structure of a leaked model without its weights. All that a generator is ever built from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gitlight.exported import export_bare
from gitlight.layer import ELEMENTWISE, IMAGE, MOVES, Layer
from gitlight.traced_layers import layers_of, puts_out_logits, up_to_the_logits

__all__ = ["ELEMENTWISE", "IMAGE", "MOVES", "Architecture", "ImageShape", "Layer"]

ImageShape = tuple[int, int, int]


@dataclass(frozen=True)
class Architecture:
    """A leaked model's structure: its operations, names, shapes. No weight is in it.

    The attacker of the threat model knows the architecture and not the parameters; generators are handed this object
    and nothing else, so that they cannot use what the attacker does not have.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Sigmoid(), nn.Linear(5, 2))
    >>> architecture = Architecture.of(model, image_shape=(3, 2, 2), n_classes=2)
    >>> dict(architecture.parameter_shapes)["1.weight"]
    torch.Size([5, 12])
    >>> [layer.kind for layer in architecture.layers]
    ['flatten', 'linear', 'sigmoid', 'linear']

    Attributes:
        layers: every operation, each after those whose results it takes; but for those behind the logits that change
            neither the cross-entropy nor a gradient, as a ``log_softmax`` does not.
        output: name of the layer that puts out the logits.
        parameter_shapes: name → shape of each parameter that has a gradient, in the model's order.
        image_shape: ``(C, H, W)`` of the model's input.
        n_classes: number of labels.
        sketched: name → shape of those gradients that reach the generator as a sketch.
        sketch_digest: a hash of the sketch; empty without one.
    """

    layers: tuple[Layer, ...]
    output: str
    parameter_shapes: Mapping[str, torch.Size]
    image_shape: ImageShape
    n_classes: int
    sketched: Mapping[str, torch.Size] = field(default_factory=dict)
    sketch_digest: bytes = b""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Architecture":
        return self  # as its layers

    @classmethod
    def of(cls, model: nn.Module, image_shape: ImageShape, n_classes: int) -> "Architecture":
        """Strip a model of its weights and trace it, in evaluation mode.

        Args:
            model: the leaked network; it is copied, not changed.
            image_shape: ``(C, H, W)`` of one input image.
            n_classes: number of labels.

        Raises:
            ArchitectureError: ``torch.export`` cannot trace the model, or an image of this shape does not fit it.
        """
        exported = export_bare(model, image_shape)
        # A frozen leaked model (requires_grad off everywhere) still leaks the gradients of all its parameters.
        is_frozen = not any(p.requires_grad for p in model.parameters())
        shapes = {key: p.shape for key, p in model.named_parameters() if p.requires_grad or is_frozen}
        layers, output = layers_of(exported, frozenset(shapes), model)
        if puts_out_logits(exported, n_classes):  # others are refused by what they end in
            layers, output = up_to_the_logits(layers, output, n_classes)
        return cls(layers, output, MappingProxyType(shapes), image_shape, n_classes)

    def __getitem__(self, name: str) -> Layer:
        """The layer of that name; KeyError where there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def results(self, image: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """What every layer puts out for one image.

        Args:
            image: ``(C, H, W)``.
            weights: parameter or constant name → value. Layers that need others, and what follows from them, are left
                out.

        Returns:
            name of the layer, or `IMAGE` → its result as traced, with a batch of one in front or wherever the model
            moves it; for operations with several results their list.
        """
        found: dict[str, Any] = {IMAGE: image.unsqueeze(0)}
        for layer in self.layers:
            needed = (*layer.parameters.values(), *layer.constants.values())
            if all(name in weights for name in needed) and all(name in found for name in layer.inputs):
                found[layer.name] = layer.apply([found[name] for name in layer.inputs], weights)
        return found

    @property
    def n_parameters(self) -> int:
        """Number of entries of one gradient."""
        return sum(shape.numel() for shape in self.parameter_shapes.values())

    @property
    def gradient_shapes(self) -> Mapping[str, torch.Size]:
        """Name → shape of each gradient as the generator gets it: that of the parameter, or of its sketch."""
        return {name: self.sketched.get(name, shape) for name, shape in self.parameter_shapes.items()}

    @property
    def n_activations(self) -> int:
        """Number of entries of the image and of all intermediate results that are not views of others."""
        computed = (prod(layer.output_shape) for layer in self.layers if layer.kind not in MOVES)
        return prod(self.image_shape) + sum(computed)

    @property
    def chain_break(self) -> Layer | None:
        """The first layer that does not take the one before as its only input; None for a chain."""
        before = IMAGE
        for layer in self.layers:
            if layer.inputs != (before,):
                return layer
            before = layer.name
        return None
