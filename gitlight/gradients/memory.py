"""How many leaks are differentiated at once: memory, counted before it is used."""

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gitlight.architecture import Architecture
from gitlight.errors import ConfigError
from gitlight.gradients.sketch import Sketch

# Workspace of a chunk on a CPU: larger ones gain nothing (docs/decisions.md).
_CPU_CHUNK_BYTES = 1400e6


@dataclass(frozen=True)
class MemoryModel:
    """Entries that a method holds, counted from the architecture.

    Attributes:
        method: ``captured``, or another.
        entry_bytes: bytes of an entry.
        result: entries that each leak's result has.
        fixed: entries of workspace, whatever the number of leaks.
        per_leak: entries of workspace for each leak that is made at once.
        per_image: entries of workspace for each of its images.
    """

    method: str
    entry_bytes: int
    result: int
    fixed: int
    per_leak: int
    per_image: int

    @classmethod
    def of(cls, architecture: Architecture, method: str, dtype: torch.dtype, sketch: Sketch | None) -> "MemoryModel":
        """The model of one method. The factors are measured (docs/decisions.md)."""
        whole = architecture.n_parameters
        result = whole if sketch is None else sum(prod(shape) for shape in sketch.shapes.values())
        entry = torch.finfo(dtype).bits // 8
        activations, scores = architecture.n_activations, _attention_scores(architecture)
        if method == "captured":
            sketched = (
                [] if sketch is None else [architecture.parameter_shapes[name].numel() for name in sketch.reductions]
            )
            return cls(
                method,
                entry,
                result,
                whole,
                2 * max(sketched, default=0) + _largest_used_again(architecture),
                3 * activations
                + 3 * _largest_unfolded(architecture)
                # Autograd keeps each layer's. Kernels of CPUs mostly do without; GPUs' of full precision do not.
                + sum(scores)
                + 2 * max(scores, default=0),
            )
        return cls(method, entry, result, 0, 2 * whole, functional_entries(architecture))  # copies of the gradient

    def leaks_per_chunk(self, images: Tensor, limit_gb: float) -> int:
        """How many leaks to make at once.

        Args:
            images: all of them, ``(B, N, C, H, W)``.
            limit_gb: for results and workspace together, as `leaks_at_once` has it.

        Raises:
            ConfigError: one at a time needs more.
        """
        n_leaks, per_leak = images.shape[:2]
        results = n_leaks * self.result * self.entry_bytes
        fixed = self.fixed * self.entry_bytes
        each = (self.per_leak + per_leak * self.per_image) * self.entry_bytes
        chunk = leaks_at_once(
            limit_gb, results, fixed, each, f"the gradients of {n_leaks} leaks take", "and making one at a time"
        )
        if self.method == "captured" and images.device.type == "cpu":
            chunk = min(chunk, max(1, int(_CPU_CHUNK_BYTES / (per_leak * self.per_image * self.entry_bytes))))
        return max(1, min(n_leaks, chunk))


def leaks_at_once(limit_gb: float, results: float, fixed: float, each: float, all_take: str, one_takes: str) -> int:
    """`leaks_that_fit`, at least one.

    Args:
        limit_gb: in GB.
        results: bytes of the results of all.
        fixed: bytes that do not depend on how many are made at once.
        each: bytes that each of them takes.
        all_take: what takes ``results``, for the message.
        one_takes: what takes ``fixed`` and ``each``.

    Raises:
        ConfigError: not even one fits.
    """
    if n := leaks_that_fit(limit_gb * 1e9, results, fixed, each):
        return n
    raise ConfigError(
        f"gradients.memory_limit_gb: {limit_gb:g} GB is too little: {all_take} {results / 1e9:.3g} GB {one_takes} "
        f"{(fixed + each) / 1e9:.3g} GB. Raise gradients.memory_limit_gb or lower data.batch_size."
    )


def leaks_that_fit(limit: float, results: float, fixed: float, each: float) -> int:
    """How many leaks can be made at once beside the results of all; 0: not even one. All arguments are bytes.

    >>> leaks_that_fit(100, results=30, fixed=5, each=10), leaks_that_fit(70, results=30, fixed=5, each=10)
    (3, 3)
    """
    # A loop holds one call's results until it has the next. A limit that has no room for both is that of a single call.
    for room in (limit - 2 * results - fixed, limit - results - fixed):
        if room >= each:
            return int(room // each)
    return 0


def functional_entries(architecture: Architecture) -> int:
    """Entries of workspace that `FunctionalGradients` need for one image, beside copies of the gradient."""
    # Values, their gradients, the unfolded input of a convolution. Attention's scores come in blocks too large for the
    # holes that others leave in a CPU's memory.
    return 3 * architecture.n_activations + 5 * sum(_attention_scores(architecture))


def _attention_scores(architecture: Architecture) -> list[int]:
    """Entries of each attention's scores, queries times keys, for one image; none of them is a layer's result."""
    return [
        # Keys that do not depend on the image are taken to be as many as queries.
        prod(layer.output_shape[:-1]) * max(s[-2] for s in (layer.output_shape, *layer.input_shapes) if len(s) > 1)
        for layer in architecture.layers
        if layer.kind == "scaled_dot_product_attention"
    ]


def _largest_used_again(architecture: Architecture) -> int:
    """Entries of the largest parameter with several uses: the gradient of each is made apart, and added."""
    uses = Counter(name for layer in architecture.layers for name in layer.parameters.values())
    return max((architecture.parameter_shapes[name].numel() for name, count in uses.items() if count > 1), default=0)


def _largest_unfolded(architecture: Architecture) -> int:
    """Entries of the largest unfolded input of a convolution, for one image."""
    sizes = [0]
    for layer in architecture.layers:
        shapes = dict(zip(layer.roles, layer.input_shapes, strict=True))
        if layer.kind == "conv2d" and "input" in shapes:
            kernel = layer.weight_shape or shapes.get("weight", ())  # which may be computed from parameters
            sizes.append(shapes["input"][0] * prod(kernel[2:]) * prod(layer.output_shape[1:]))
    return max(sizes)
