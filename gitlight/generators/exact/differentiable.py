"""The damped solution of a layer's gradient equations, differentiable in ``δ`` by the implicit function theorem."""

from typing import Any

import torch
from torch import Tensor

from gitlight.generators.exact.affine import AffineRule


class _Solve(torch.autograd.Function):
    """``a = (KᵀK + λ)⁻¹ Kᵀ g`` with ``K = K(δ)``.

    The solution makes ``F(a, δ) = Kᵀ(g − K a) − λ a`` vanish, so that for a loss with ``ā = ∂loss/∂a`` and
    ``u = (KᵀK + λ)⁻¹ ā`` its derivative in ``δ`` is that of ``⟨u, F⟩ = ⟨K u, g − K a⟩ − λ ⟨u, a⟩`` at constant ``u``
    and ``a``. One more solve with the same factor, and no graph through assembly and factorisation.
    """

    @staticmethod
    def forward(ctx: Any, delta: Tensor, gradient: Tensor, damping: float, rule: AffineRule) -> Tensor:
        normal = rule.normal(delta)
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        diagonal += damping
        factor, failed = torch.linalg.cholesky_ex(normal)
        factor = torch.where((failed == 0)[..., None, None], factor, torch.eye(normal.shape[-1]).to(factor))
        found = _apply_inverse(rule, factor, rule.right(delta, gradient))
        ctx.save_for_backward(delta, gradient, factor, found)
        ctx.rule = rule
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        delta, gradient, factor, found = ctx.saved_tensors
        rule = ctx.rule
        pulled = _apply_inverse(rule, factor, upstream[0])
        with torch.enable_grad():
            leaf = delta.detach().requires_grad_()
            residual = gradient - rule.weight_gradient(found, leaf)
            product = (rule.weight_gradient(pulled, leaf) * residual).sum()
            (slope,) = torch.autograd.grad(product, leaf)
        return slope, None, None, None


def _apply_inverse(rule: AffineRule, factor: Tensor, right: Tensor) -> Tensor:
    return rule.from_columns(torch.cholesky_solve(rule.columns(right).transpose(-1, -2), factor).transpose(-1, -2))


def solve_differentiably(rule: AffineRule, delta: Tensor, weight_gradient: Tensor, damping: float) -> Tensor:
    """The input of a layer from its gradient equations alone, with a gradient in ``δ``.

    Args:
        rule: the layer's.
        delta: ``(B, *output_shape)`` float64.
        weight_gradient: ``(B, *weight.shape)``; treated as a constant.
        damping: what is added to the diagonal of the normal matrix of a ``δ`` of norm one, over the mean of that
            diagonal for one that is everywhere the same.

    Returns:
        ``(B, *input_shape)``.
    """
    scale = delta.flatten(1).norm(dim=1).clamp_min(1e-30)
    unit = delta / scale.view(-1, *[1] * (delta.dim() - 1))
    gradient = weight_gradient / scale.detach().view(-1, *[1] * (weight_gradient.dim() - 1))
    # Of a δ that is everywhere the same: a constant, which neither other leaks nor a derivative in δ enter.
    even = torch.full_like(unit[:1], unit[0].numel() ** -0.5)
    level = float(rule.normal(even).diagonal(dim1=-2, dim2=-1).mean())
    found: Tensor = _Solve.apply(unit, gradient, damping * level, rule)
    # The solution scales inversely with δ; its direction was differentiated above, its size here.
    return found * (scale.detach() / scale).view(-1, *[1] * (found.dim() - 1))
