"""The equations of one layer at one leak: how many there are, their rank, and how they treat errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gitlight.architecture import ELEMENTWISE, Architecture, Layer
from gitlight.generators.exact.affine import LARGEST_STACKED, AffineRule
from gitlight.generators.exact.rule import Estimate, InverseRule
from gitlight.identifiability.drawn import DrawnLeak


@dataclass(frozen=True)
class System:
    """What the eigenvalues of a system's normal matrix say.

    Attributes:
        rank: of the system.
        condition: root of the ratio of the largest eigenvalue to the smallest that is not zero; infinite for rank 0.
        amplification: root mean square error of an unknown over the root mean square error of the gradient's entries,
            if all are as large as these entries; infinite where the rank is not full. Forward equations are taken for
            as wrong as those of the gradient.
    """

    rank: int
    condition: float
    amplification: float


@dataclass(frozen=True)
class Measured:
    """One layer at one leak. A system is None where it is too large to compute."""

    forward_equations: int
    gradient: System | None
    stacked: System | None


def measure(
    architecture: Architecture, rules: Mapping[str, InverseRule], rule: AffineRule, leak: DrawnLeak, stack: bool
) -> Measured:
    """Rank and conditioning of a layer's systems, ``δ`` scaled to length one.

    The gradient equations are one small system per column and are computed up to `LARGEST_RANK` unknowns each, the
    stacked ones up to `LARGEST_STACKED` unknowns in all.

    Args:
        architecture: the leaked model's.
        rules: of all its layers.
        rule: the layer's.
        leak: what happens at one image.
        stack: whether the attack solves the stacked system. Where it does not, and the gradient equations alone have
            full rank, these stand for both.
    """
    known = known_outputs(architecture, rules, rule.layer.name, leak)
    n_forward = int(known.sum())
    delta = leak.deltas[rule.layer.name]
    size = float(delta.norm())
    unit = delta / size if size > 0 else delta
    relative = leak.gradient_size / size if size > 0 else math.inf
    gradient = _of_columns(rule, unit, relative) if rule.rank_is_computable else None
    full = gradient is not None and gradient.rank == rule.n_inputs
    if n_forward == 0 or (full and not stack):
        return Measured(n_forward, gradient, gradient)
    if rule.n_inputs > LARGEST_STACKED:
        return Measured(n_forward, gradient, None)
    assert rule.weight is not None
    normal = unit.new_zeros(1, rule.n_inputs, rule.n_inputs)
    rule.add_normal(normal, unit)
    normal += rule.forward_normal(leak.weights[rule.weight], known.double())
    return Measured(n_forward, gradient, _system(torch.linalg.eigvalsh(normal[0]), 1, rule.n_inputs, relative))


def known_outputs(architecture: Architecture, rules: Mapping[str, InverseRule], name: str, leak: DrawnLeak) -> Tensor:
    """Which entries of a layer's result follow from results further up, were all those known that can be solved for.

    A layer with a weight that leaks tells its whole input; an activation tells what its rule can invert.

    Returns:
        ``(1, *output_shape)`` bool.
    """
    known = torch.zeros_like(leak.values[name], dtype=torch.bool)
    for layer in architecture.layers:
        if name in layer.inputs:
            known |= _known_input(architecture, rules, layer, layer.inputs.index(name), leak)
    return known


def _known_input(
    architecture: Architecture, rules: Mapping[str, InverseRule], layer: Layer, position: int, leak: DrawnLeak
) -> Tensor:
    rule = rules[layer.name]
    value = leak.values[layer.inputs[position]]
    if isinstance(rule, AffineRule) and rule.weight is not None:
        return torch.ones_like(value, dtype=torch.bool)
    # Buffers never leak, and the sum of two branches does not tell them apart.
    if rule.inverts == "no" or layer.constants or (layer.kind == "add" and len(layer.inputs) > 1):
        return torch.zeros_like(value, dtype=torch.bool)
    above = known_outputs(architecture, rules, layer.name, leak)
    if layer.kind in ELEMENTWISE:
        return above if rule.inverts == "yes" else above & (leak.values[layer.name] > 0)
    variance = torch.where(above, 0.0, torch.inf).double()
    others = [None] * len(layer.inputs)
    found = rule.invert(Estimate(leak.values[layer.name], variance), position, others, leak.weights)
    return torch.isfinite(found.variance).expand_as(found.value).reshape(value.shape)


def _of_columns(rule: AffineRule, unit: Tensor, relative: float) -> System:
    eigenvalues = torch.linalg.eigvalsh(rule.normal(unit)[0])  # (blocks, entries of a column)
    # Counted rather than divided: pixels beyond the last whole patch are in no column.
    n_columns = rule.columns(torch.zeros(1, *rule.layer.input_shape)).shape[2]
    return _system(eigenvalues.flatten(), n_columns, rule.n_inputs, relative)


def _system(eigenvalues: Tensor, n_copies: int, n_unknowns: int, relative: float) -> System:
    """Args: eigenvalues of the normal matrix's blocks; how often each occurs; unknowns; gradient entry over ``δ``."""
    largest = float(eigenvalues.max())
    # The threshold of `AffineRule`, what rounding makes of a zero.
    kept = eigenvalues[eigenvalues > len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * largest]
    rank = len(kept) * n_copies
    if rank == 0:
        return System(0, math.inf, math.inf)
    condition = (largest / float(kept.min())) ** 0.5
    variance = float((1 / kept).sum()) * n_copies / n_unknowns
    return System(rank, condition, relative * variance**0.5 if rank == n_unknowns else math.inf)
