"""Concatenation, against autograd."""

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.errors import ArchitectureError
from gitlight.generators.exact import Estimate, rule_for


class Concatenation(nn.Module):
    """Of the image, a part of it that is two long, and its sigmoid."""

    def __init__(self, dimension, batch_first=True):
        super().__init__()
        self.dimension, self.batch_first = dimension, batch_first

    def parts(self, x):
        x = x if self.batch_first else x.transpose(0, 2)
        return x, x.narrow(self.dimension, 0, 2), torch.sigmoid(x)

    def forward(self, x):
        return torch.cat(self.parts(x), self.dimension)


def rule_of(model):
    return rule_for(Architecture.of(model, (2, 3, 4), 1).layers[-1])


@pytest.mark.parametrize(
    "model",
    [
        *(Concatenation(dimension) for dimension in (1, 2, 3, -1, -3)),
        *(Concatenation(dimension, batch_first=False) for dimension in (0, -3)),
    ],
    ids=lambda model: f"{model.dimension}{'' if model.batch_first else ', batch in the middle'}",
)
def test_every_input_and_its_delta_are_slices(model):
    torch.manual_seed(0)
    images = torch.rand(2, 2, 3, 4)
    parts = [[part.detach().requires_grad_() for part in model.parts(image.unsqueeze(0))] for image in images]
    outputs = [torch.cat(its, model.dimension) for its in parts]
    deltas = [torch.randn_like(output) for output in outputs]
    wanted = [
        torch.autograd.grad(output, its, delta) for output, its, delta in zip(outputs, parts, deltas, strict=True)
    ]
    rule = rule_of(model)

    def stacked(values, shape):
        return torch.stack([value.detach().reshape(shape) for value in values])

    output, delta = (stacked(values, rule.layer.output_shape) for values in (outputs, deltas))
    for position, shape in enumerate(rule.layer.input_shapes):
        found = rule.invert(Estimate(output, 2 * output.abs()), position, [None] * 3, {})
        torch.testing.assert_close(found.value, stacked([its[position] for its in parts], shape))
        torch.testing.assert_close(found.variance, 2 * found.value.abs())
        carried = rule.carry(delta, position, [None] * 3, None, {})
        torch.testing.assert_close(carried, stacked([its[position] for its in wanted], shape))


def test_bounds_are_sliced_along():
    rule = rule_of(Concatenation(1))
    at_most = torch.rand(1, 6, 3, 4) > 0.5
    output = Estimate(torch.rand(1, 6, 3, 4), torch.zeros(1, 6, 3, 4), at_most)
    assert torch.equal(rule.invert(output, 2, [None] * 3, {}).at_most, at_most[:, 4:])


def test_a_parameter_that_is_not_expanded_is_named():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 3, 4))

        def forward(self, x):
            return torch.cat([self.token, x], dim=1)

    with pytest.raises(ArchitectureError, match=r"cat .*parameter or buffer as it is"):
        rule_of(Token())


def test_examples_put_side_by_side_are_named():
    class Doubled(nn.Module):
        def forward(self, x):
            return torch.cat([x, torch.sigmoid(x)])

    with pytest.raises(ArchitectureError, match=r"cat .*side by side"):
        rule_of(Doubled())
