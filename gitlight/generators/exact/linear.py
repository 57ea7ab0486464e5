"""The inverse rule of a fully connected layer, applied to one vector per example or to each of its tokens."""

import torch
from torch import Tensor
from typing_extensions import override

from gitlight.architecture import Layer
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.rule import register_rule


@register_rule("linear")
class LinearRule(AffineRule):
    """``∂L/∂W = Σ_t δ_t ⊗ a_t`` over tokens ``t``: exact for as many tokens as the layer has outputs.

    For one token it has rank one, the input is exact whatever the layer's width, and the bias gradient is ``δ``.

    Attributes:
        by_factor: whether that rank alone is to give ``δ``, of a last layer without a bias: `allow_factor` says.
    """

    by_factor = False

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.unit = "feature"
        self._n_outputs, self._n_features = layer.output_shape[-1], layer.input_shape[-1]
        self.n_unknowns = self.n_inputs // self._n_features
        self.n_equations = self._n_outputs
        self._find_rank()

    def _structure(self) -> tuple[int, Tensor]:
        rank = min(self.n_unknowns, self._n_outputs)  # that of δ itself, a matrix in general position
        return rank, torch.full((1, 1, self.n_unknowns), rank == self.n_unknowns)

    def reveals_delta(self) -> str | None:
        """The bias, where it is added to one vector only."""
        return self.bias if self.n_unknowns == 1 else None

    @override
    def normal(self, delta: Tensor) -> Tensor:
        tokens = self._tokens(delta)
        return (tokens @ tokens.transpose(1, 2)).unsqueeze(1)

    @override
    def add_normal(self, system: Tensor, delta: Tensor) -> None:
        shape = (self.n_unknowns, self._n_features)
        of_each_feature = system.view(len(system), *shape, *shape).diagonal(dim1=2, dim2=4)
        of_each_feature += self.normal(delta).squeeze(1).unsqueeze(-1)

    @override
    def columns(self, inputs: Tensor) -> Tensor:
        return self._tokens(inputs).transpose(1, 2).unsqueeze(1)

    @override
    def from_columns(self, columns: Tensor) -> Tensor:
        return columns.squeeze(1).transpose(1, 2).reshape(-1, *self.layer.input_shape)

    @override
    def matrix(self, block: int, delta: Tensor, basis: Tensor) -> Tensor:
        return self._tokens(delta).transpose(1, 2) @ basis

    @override
    def equations(self, block: int, weight_gradient: Tensor) -> Tensor:
        return weight_gradient

    @override
    def right(self, delta: Tensor, weight_gradient: Tensor) -> Tensor:
        return (self._tokens(delta) @ weight_gradient).view(-1, *self.layer.input_shape)

    @override
    def solve(self, delta: Tensor, weight_gradient: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.n_unknowns > 1:
            return super().solve(delta, weight_gradient, damping)
        # δ ⊗ a: all entries meet one equation, so that one pass over the gradient says what each refinement would.
        scale = delta.flatten(1).norm(dim=1)
        safe = torch.where((scale > 0) & torch.isfinite(scale), scale, 1.0)
        found = self.right(delta / safe.view(-1, *[1] * (delta.dim() - 1)), weight_gradient)
        each = (-1, *[1] * (found.dim() - 1))
        damping = damping + 1e-300
        found = found * ((1 - (damping / (1 + damping)) ** 3) / safe).view(each)
        solvable = (scale > 0) & torch.isfinite(scale) & torch.isfinite(found.flatten(1)).all(dim=1)
        found = torch.where(solvable.view(each), found, 0.0)
        return found, ((1 + damping) * safe.square()).reciprocal().view(each).expand_as(found), solvable

    @override
    def weight_gradient(self, inputs: Tensor, delta: Tensor) -> Tensor:
        return self._tokens(delta).transpose(1, 2) @ self._tokens(inputs)

    @override
    def adjoint(self, outputs: Tensor, weight: Tensor) -> Tensor:
        return outputs @ weight

    @override
    def forward_normal(self, weight: Tensor, precision: Tensor) -> Tensor:
        blocks = torch.einsum("oi,bto,oj->btij", weight, self._tokens(precision), weight)
        size = self.n_inputs
        result = blocks.new_zeros(len(blocks), self.n_unknowns, self._n_features, self.n_unknowns, self._n_features)
        for token in range(self.n_unknowns):
            result[:, token, :, token] = blocks[:, token]
        return result.view(-1, size, size)

    @override
    def forward_matrix(self, weight: Tensor) -> Tensor:
        return torch.kron(torch.eye(self.n_unknowns, dtype=weight.dtype, device=weight.device), weight)

    @override
    def patches(self, inputs: Tensor) -> Tensor:
        return self._tokens(inputs)

    @override
    def outputs(self, outputs: Tensor) -> Tensor:
        return self._tokens(outputs)

    def _tokens(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), self.n_unknowns, values.shape[-1])
