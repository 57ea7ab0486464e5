import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.generators.exact import rule_for
from gitlight.generators.exact.differentiable import solve_differentiably

DAMPING = 0.1


@pytest.mark.parametrize("conv", [nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(2, 4, 2, 2), nn.Conv2d(4, 4, 3, 1, 1, groups=2)])
def test_solution_and_derivative_are_those_of_a_dense_solve(conv):
    shape = (conv.in_channels, 6, 6)
    rule = rule_for(Architecture.of(nn.Sequential(conv, nn.Flatten()), shape, 2).layers[0])
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(2, *rule.layer.output_shape, generator=generator, dtype=torch.float64).requires_grad_()
    gradient = torch.randn(2, *conv.weight.shape, generator=generator, dtype=torch.float64)

    def dense(delta):
        scale = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        unit = delta / scale
        even = torch.full_like(unit[:1], unit[0].numel() ** -0.5).detach()
        level = rule.normal(even).diagonal(dim1=-2, dim2=-1).mean()
        normal = rule.normal(unit) + DAMPING * level * torch.eye(rule.column_size, dtype=torch.float64)
        right = rule.columns(rule.right(unit, gradient / scale.unsqueeze(4))).transpose(-1, -2)
        return rule.from_columns(torch.linalg.solve(normal, right).transpose(-1, -2))

    found, wanted = solve_differentiably(rule, delta, gradient, DAMPING), dense(delta)
    torch.testing.assert_close(found, wanted)
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    slopes = [torch.autograd.grad((direction * value).sum(), delta)[0] for value in (found, wanted)]
    torch.testing.assert_close(slopes[0], slopes[1])
