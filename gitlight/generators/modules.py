"""Modules of a leaked model: the parts that its data passes one after the other, found in the traced graph."""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gitlight.architecture import IMAGE, MOVES, Architecture, Layer
from gitlight.errors import ArchitectureError, ConfigError

_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm")
"""Kinds that are no module of their own: a norm belongs to the layer whose result it takes."""


@dataclass(frozen=True)
class Module:
    """Consecutive layers with one input and one output; branches between them rejoin within the module.

    Attributes:
        layers: in the order of the graph.
        parameters: names of the parameters whose gradients are this module's; one that an earlier module uses, too, is
            that module's.
        input_shape: one example's.
        output_shape: one example's.
    """

    layers: tuple[Layer, ...]
    parameters: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """First and last layer, for messages."""
        first, last = self.layers[0].name, self.layers[-1].name
        return first if first == last else f"{first} … {last}"


def divide(architecture: Architecture, patterns: Sequence[str] | None = None) -> tuple[Module, ...]:
    """The modules of a leaked model, from input to output.

    The graph is cut wherever one result alone is still needed: behind each layer of a chain, each residual join, each
    attention block. Layers without parameters and norms are part of the module before them; those that only move
    entries, of the one behind.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> for module in divide(Architecture.of(model, (3, 8, 8), 2)):
    ...     print(module.name, module.parameters, module.input_shape)
    0 … 2 ('0.weight', '0.bias', '1.weight', '1.bias') (3, 8, 8)
    3 … 4 ('4.weight', '4.bias') (4, 6, 6)

    Args:
        architecture: the leaked model's.
        patterns: with ``*`` and ``?``, over paths of layers: neighbouring modules that the same pattern fits are one.

    Raises:
        ArchitectureError: there is no layer with parameters.
        ConfigError: a pattern fits no layer.
    """
    pieces = _merged(list(_pieces(architecture)))
    if patterns is not None:
        pieces = _joined(pieces, architecture, patterns)
    if not any(layer.parameters for piece in pieces for layer in piece):
        raise ArchitectureError("The leaked model has no layer with parameters, so there is no gradient to invert.")
    modules: list[Module] = []
    seen: set[str] = set()
    shape: tuple[int, ...] = tuple(architecture.image_shape)
    for piece in pieces:
        own = tuple(dict.fromkeys(n for layer in piece for n in layer.parameters.values() if n not in seen))
        seen.update(own)
        output_shape = tuple(piece[-1].output_shape)
        modules.append(Module(tuple(piece), own, shape, output_shape))
        shape = output_shape
    return tuple(modules)


def _pieces(architecture: Architecture) -> Iterator[list[Layer]]:
    """The layers between places where one result alone is still needed."""
    from_image = {IMAGE}
    last_use: dict[str, int] = {}
    for number, layer in enumerate(architecture.layers):
        if from_image.intersection(layer.inputs):
            from_image.add(layer.name)
        last_use.update(dict.fromkeys(layer.inputs, number))
    piece: list[Layer] = []
    needed: set[str] = {IMAGE}
    for number, layer in enumerate(architecture.layers):
        piece.append(layer)
        if layer.name in from_image:
            needed.add(layer.name)
        needed = {name for name in needed if last_use.get(name, -1) > number}
        one_result = bool(layer.output_shape)  # a split has several
        if (needed == {layer.name} and one_result) or layer.name == architecture.output:
            yield piece
            piece = []


def _merged(pieces: list[list[Layer]]) -> list[list[Layer]]:
    """Pieces of which each has parameters of its own, and is not only a norm."""
    merged: list[list[Layer]] = []
    moves: list[Layer] = []
    for piece in pieces:
        if all(layer.kind in MOVES and not layer.parameters for layer in piece):
            moves += piece
        elif merged and all(layer.kind in _NORMS or not layer.parameters for layer in piece):
            merged[-1] += [*moves, *piece]
            moves = []
        else:
            merged.append([*moves, *piece])
            moves = []
    if moves and merged:
        merged[-1] += moves
    # What stands before the first layer with parameters has no module before it.
    while len(merged) > 1 and not any(layer.parameters for layer in merged[0]):
        merged[:2] = [merged[0] + merged[1]]
    return merged


def _joined(pieces: list[list[Layer]], architecture: Architecture, patterns: Sequence[str]) -> list[list[Layer]]:
    names = [layer.name for layer in architecture.layers]
    for one in patterns:
        if not fnmatch.filter(names, one):
            raise ConfigError(
                f"generator.modules: {one!r} fits no layer of the leaked model. "
                f"Its layers: {', '.join(names[:50])}{', …' if len(names) > 50 else ''}."
            )

    def first_fitting(piece: list[Layer]) -> str | None:
        return next((p for p in patterns if any(fnmatch.fnmatch(layer.name, p) for layer in piece)), None)

    joined: list[list[Layer]] = []
    former: str | None = None
    for piece in pieces:
        pattern = first_fitting(piece)
        if joined and pattern is not None and pattern == former:
            joined[-1] += piece
        else:
            joined.append(list(piece))
        former = pattern
    return joined
