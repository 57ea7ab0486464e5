"""The inverse rule of a fully connected layer applied to one vector per example."""

from torch import Tensor

_TINY = 1e-30


class LinearRule:
    """``∂L/∂W = δ ⊗ a`` has rank one: the input is exact whatever the layer's width."""

    def __init__(self) -> None:
        self.exact = True
        self.fits_weight = True
        self.n_unknowns = 1  # per input, since the rank-one system decouples
        self.reason = "exact"

    def solve_input(self, delta: Tensor, weight_gradient: Tensor) -> Tensor:
        """``a = δᵀ (∂L/∂W) / ‖δ‖²``, the least-squares solution of Eq. (1); zero where ``δ`` is zero.

        Args:
            delta: ``(B, outputs)``.
            weight_gradient: ``(B, outputs, inputs)``.

        Returns:
            ``(B, inputs)``.
        """
        # Scaled first: the square of a float32 δ near 1e-25 would underflow the guard, not the solve.
        size = delta.abs().amax(dim=1, keepdim=True).clamp_min(_TINY)
        unit = delta / size
        projected = (unit.unsqueeze(1) @ (weight_gradient / size.unsqueeze(2))).squeeze(1)
        return projected / unit.square().sum(dim=1, keepdim=True).clamp_min(_TINY)

    def carry(self, delta: Tensor, weight: Tensor) -> Tensor:
        """``Wᵀδ``: ``(B, outputs)`` to ``(B, inputs)``."""
        return delta @ weight

    def patches(self, inputs: Tensor) -> Tensor:
        """What each output sees: ``(B, inputs)`` to ``(B, 1, inputs)``."""
        return inputs.unsqueeze(1)

    def outputs(self, outputs: Tensor) -> Tensor:
        """Outputs in the order of `patches`: ``(B, outputs)`` to ``(B, 1, outputs)``."""
        return outputs.unsqueeze(1)
