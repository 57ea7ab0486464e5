"""Sketches: fixed random linear maps that shrink gradients too large for a generator."""

import fnmatch
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain

import torch
from torch import Tensor

from gitlight.architecture import Architecture, Layer
from gitlight.config import SketchConfig
from gitlight.data.pair import Gradients, as_rows
from gitlight.data.sampling import mixed_seed
from gitlight.errors import ConfigError

_EMBEDDINGS = ("add", "expand", "expand_as", "broadcast_to", "repeat", "slice", "embedding")
"""Operations whose parameters are embeddings: added to all images' features, or repeated or cut for them."""


class Sketch:
    """A count sketch (Charikar et al. 2002) of each large parameter's gradient.

    Every entry is given one of ``size`` places and a sign; entries with the same place are summed. The map is linear,
    and keeps inner products in expectation. All places get equally many entries (±1). Places and signs are drawn on the
    CPU, so that they are the same everywhere.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 50), nn.Linear(50, 2))
    >>> sketch = Sketch(Architecture.of(model, (3, 2, 2), 2), SketchConfig(name="count", size=64))
    >>> {name: tuple(shape) for name, shape in sketch.shapes.items()}
    {'1.weight': (64,), '1.bias': (50,), '2.weight': (2, 50), '2.bias': (2,)}

    Attributes:
        shapes: parameter name → shape of a leak's gradient after the sketch, in the model's order.
    """

    shapes: Mapping[str, torch.Size]

    def __init__(self, architecture: Architecture, settings: SketchConfig) -> None:
        """Draw the projections.

        Raises:
            ConfigError: a pattern of ``gradients.sketch.keep_exact`` fits no parameter.
        """
        whole = architecture.parameter_shapes
        exact = _exact(architecture, settings)
        sketched = [n for n, shape in whole.items() if n not in exact and shape.numel() > settings.size]
        self.shapes = {n: torch.Size([settings.size]) if n in sketched else shape for n, shape in whole.items()}
        self._size = settings.size
        self._maps = {name: _draw(whole[name].numel(), name, settings.seed) for name in sketched}
        self.reductions: dict[str, Callable[[Tensor], Tensor]] = {n: partial(self._apply, n) for n in sketched}

    def __call__(self, gradients: Gradients) -> Gradients:
        """Sketch gradients ``(B, *shape)`` that are there already."""
        return {n: self.reductions[n](g) if n in self.reductions else g for n, g in gradients.items()}

    def seen_by_generators(self, architecture: Architecture) -> Architecture:
        """The architecture with the shapes of the sketched gradients."""
        sketched = {name: self.shapes[name] for name in self._maps}
        return replace(architecture, sketched=sketched, sketch_digest=self.digest if sketched else b"")

    @cached_property
    def digest(self) -> bytes:
        """A hash of the projections, 32 bytes: sketches with equal digests are the same map."""
        digest = hashlib.sha256(repr([(name, tuple(shape)) for name, shape in self.shapes.items()]).encode())
        for order, signs in self._maps.values():
            digest.update(order.cpu().numpy().tobytes())
            digest.update(signs.cpu().numpy().tobytes())
        return digest.digest()

    def _apply(self, name: str, gradient: Tensor) -> Tensor:
        order, signs = (part.to(gradient.device) for part in self._maps[name])
        self._maps[name] = order, signs
        signed = as_rows(gradient).index_select(1, order).mul_(signs)
        whole = signed.shape[1] // self._size * self._size
        # Places are filled in turn, by a sum over rows: in the same order on every device, unlike a scattered sum.
        sums = signed[:, :whole].view(len(gradient), -1, self._size).sum(dim=1)
        sums[:, : signed.shape[1] - whole] += signed[:, whole:]
        return sums


def _draw(n_entries: int, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Which entry comes where, and its sign."""
    generator = torch.Generator().manual_seed(mixed_seed(f"sketch of {name}", seed))
    order = torch.randperm(n_entries, generator=generator).to(torch.int32)
    return order, torch.randint(0, 2, (n_entries,), generator=generator, dtype=torch.int8) * 2 - 1


def _exact(architecture: Architecture, settings: SketchConfig) -> set[str]:
    """Names of the parameters that are kept whole."""
    shapes = architecture.parameter_shapes
    if settings.keep_exact is not None:
        for pattern in settings.keep_exact:
            if not fnmatch.filter(shapes, pattern):
                raise ConfigError(
                    f"gradients.sketch.keep_exact: {pattern!r} fits no parameter of the leaked model. "
                    f"Its parameters: {', '.join(list(shapes)[:50])}{', …' if len(shapes) > 50 else ''}."
                )
        return {name for pattern in settings.keep_exact for name in fnmatch.filter(shapes, pattern)}
    last: list[Layer] = []
    for layer in reversed([layer for layer in architecture.layers if layer.parameters]):
        last.append(layer)
        if any(len(shapes[name]) > 1 for name in layer.parameters.values()):
            break  # what came before is a temperature, or a bias whose weight is computed
    embeddings = [layer.parameters.values() for layer in architecture.layers if layer.kind in _EMBEDDINGS]
    return {
        *chain(*(layer.parameters.values() for layer in last)),
        *chain(*embeddings),
        *(layer.parameters["bias"] for layer in architecture.layers if "bias" in layer.parameters),
        *(name for name, shape in shapes.items() if len(shape) == 1),
    }
