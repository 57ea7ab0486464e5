"""Inverse rules: what each kind of operation gives away of its input; and the decorator that registers one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.registry import did_you_mean

Weights = Mapping[str, Tensor]
"""Name of a leaked parameter → its estimate, float64."""

NOTHING, OUTPUT, INPUT = "nothing", "output", "input"


@dataclass(frozen=True)
class Estimate:
    """What is known of one result of the leaked model, for each of ``B`` leaks.

    Attributes:
        value: ``(B, *shape)`` float64.
        variance: of each entry's error, ``(B, *shape)``; zero where the value is exact, infinite where only
            ``at_most`` says something.
        at_most: ``(B, *shape)`` bool: entries of which ``value`` is only an upper bound (a unit that ReLU switched
            off); None: there are none.
    """

    value: Tensor
    variance: Tensor
    at_most: Tensor | None = None

    def reshaped(self, shape: Sequence[int]) -> "Estimate":
        """The same entries as ``(B, *shape)``."""
        size = (len(self.value), *shape)
        at_most = None if self.at_most is None else self.at_most.reshape(size)
        return Estimate(self.value.reshape(size), self.variance.expand_as(self.value).reshape(size), at_most)


class InverseRule:
    """What one operation's output, its ``δ = ∂L/∂output`` and its own gradients say of its input.

    The base class knows of nothing but the chain rule: ``δ`` is carried to an input whose value is known. A rule
    overrides what its operation allows. Shapes are those of the `Layer`, with ``B`` leaks in front, float64.

    Attributes:
        inverts: ``"yes"``: the input follows from the output; ``"partly"``: some entries do, others are bounded;
            ``"no"``.
        carry_needs: what `carry` must know beside ``δ`` and the weights: nothing, the output or the input.
        carries_without_weights: whether `carry` needs no parameter and no buffer, though the operation has some.
        carry_exact: whether `carry` is exact, given exactly what it needs.
        homogeneous: whether ``f(t·x) = t·f(x)`` for ``t > 0`` and all that it computes with are its inputs; such
            operations conserve ``Σ δ·x`` (`gitlight.generators.exact.conservation`).
        slopes: of an activation with two, above and below zero, that its value alone may not tell apart under noise.
        loses: in words, what cannot be exact, for the report; empty if nothing is lost.
    """

    inverts: ClassVar[Literal["yes", "partly", "no"]] = "no"
    carry_needs: ClassVar[Literal["nothing", "output", "input"]] = "input"
    carries_without_weights: ClassVar[bool] = False
    carry_exact: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = False
    slopes: tuple[float, float] | None = None
    loses: str = ""

    def __init__(self, layer: Layer) -> None:
        """Raises: ArchitectureError, if these arguments of the operation are beyond the rule."""
        self.layer = layer

    def reveals_delta(self) -> str | None:
        """The name of the parameter whose gradient is ``δ`` of this operation's output itself; None if there is none.

        A parameter that is added once, at one place, has the gradient ``δ``: nothing is summed away.
        """
        return None

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """Input number ``position`` from the output (and the other inputs, where they are needed).

        Raises:
            NotImplementedError: the operation cannot be inverted (``inverts`` is ``"no"``).
        """
        raise NotImplementedError(f"{self.layer.place}: the input does not follow from the output")

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``∂L/∂input`` for input number ``position``: by default the chain rule at known inputs, by autograd."""
        values = []
        for shape, known in zip(self.layer.input_shapes, inputs, strict=True):
            zeros = delta.new_zeros(len(delta), *shape)
            values.append(zeros if known is None else known.value.reshape(len(delta), *shape))

        def of_one(example: Sequence[Tensor], its_delta: Tensor) -> Tensor:
            def forward(moved: Tensor) -> Tensor:
                arguments = [moved if number == position else one for number, one in enumerate(example)]
                return self.layer.apply(self.layer.as_traced(arguments), weights)

            result, pull = torch.func.vjp(forward, example[position])  # type: ignore[misc]  # three only with has_aux
            (carried,) = pull(its_delta.reshape(result.shape))
            return carried

        return torch.func.vmap(of_one)(values, delta)


_RULES: dict[str, type[InverseRule]] = {}

R = TypeVar("R", bound=type[InverseRule])


def register_rule(*kinds: str) -> Callable[[R], R]:
    """Class decorator: the rule for operations of these kinds (ATen names, as in `Layer.kind`).

    >>> @register_rule("hardtanh_of_the_example")
    ... class Example(InverseRule):
    ...     carry_needs = "output"
    >>> "hardtanh_of_the_example" in known_kinds()
    True

    Raises:
        ValueError: there is a rule for one of them already.
    """

    def register(rule: R) -> R:
        for kind in kinds:
            if kind in _RULES:
                raise ValueError(f"There is an inverse rule for {kind!r} already: {_RULES[kind].__name__}")
            _RULES[kind] = rule
        return rule

    return register


def known_kinds() -> list[str]:
    """All kinds that have a rule, in the order of registration."""
    return list(_RULES)


def rule_for(layer: Layer) -> InverseRule:
    """The rule of a layer.

    Raises:
        ArchitectureError: there is none for this kind, or it does not know these arguments.
    """
    if layer.kind not in _RULES:
        kinds = known_kinds()
        raise ArchitectureError(
            f"There is no inverse rule for {layer.place} of the leaked model.{did_you_mean(layer.kind, kinds)} "
            f"Rules are registered for: {', '.join(kinds)}. "
            "A rule of your own is one class with the decorator gitlight.generators.exact.register_rule."
        )
    return _RULES[layer.kind](layer)
