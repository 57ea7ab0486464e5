"""The inverse rules of average and max pooling."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from gitlight.architecture import Layer
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule


@register_rule("avg_pool2d", "adaptive_avg_pool2d", "mean")
class AveragePoolingRule(InverseRule):
    """Linear: ``δ`` is spread over each window exactly; the input is determined where a window is one entry."""

    carry_needs = "nothing"
    homogeneous = True

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        n_inputs, n_outputs = prod(layer.input_shape), prod(layer.output_shape)
        self._identity = layer.input_shape == layer.output_shape and _window_is_one(layer)
        self.inverts = "yes" if self._identity else "no"  # type: ignore[misc]  # depends on the window
        if not self._identity:
            self.loses = f"all but the averages: {n_outputs} numbers for {n_inputs} entries"

    def invert(self, output: Estimate, position: int, others: Sequence[Estimate | None], weights: Weights) -> Estimate:
        """The output itself, where every window is one entry."""
        return output if self._identity else super().invert(output, position, others, weights)


@register_rule("max_pool2d")
class MaxPoolingRule(InverseRule):
    """Only the largest entry of each window is seen, and not where it was: ``δ`` needs the input."""

    carry_needs = "input"
    homogeneous = True

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        n_inputs, n_outputs = prod(layer.input_shape), prod(layer.output_shape)
        self.loses = f"all but the largest of each window: {n_outputs} numbers for {n_inputs} entries, and their places"

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """``δ`` to the largest entry of each window of a known input."""
        if inputs[0] is None:
            raise ValueError(f"{self.layer.place}: δ goes to the largest entries of an input that is not known")
        return super().carry(delta, position, inputs, output, weights)


def _window_is_one(layer: Layer) -> bool:
    window = layer.arguments.get("kernel_size")
    # divisor_override divides by another number than the window's size.
    return window is None or (all(size == 1 for size in window) and layer.arguments["divisor_override"] in (None, 1))
