"""Batch normalisation in evaluation mode, against PyTorch's and autograd."""

import pytest
import torch
from dense import layer_of
from torch import nn

from gitlight.errors import ArchitectureError
from gitlight.generators.exact import Estimate, rule_for


def random_norm(features=3, affine=True, spatial=True):
    torch.manual_seed(0)
    module = (nn.BatchNorm2d if spatial else nn.BatchNorm1d)(features, affine=affine).double().eval()
    for tensor in (*module.parameters(), module.running_mean, module.running_var):
        tensor.data.uniform_(0.5, 2)
    return module


def weights_of(module):
    return {name: tensor.detach() for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("spatial", [True, False])
def test_the_input_and_its_error_follow_from_the_output(affine, spatial):
    module = random_norm(affine=affine, spatial=spatial)
    inputs = torch.randn(4, 3, *((5, 2) if spatial else ()), dtype=torch.float64, requires_grad=True)
    outputs = module(inputs)
    delta = torch.randn_like(outputs)
    (carried,) = torch.autograd.grad(outputs, inputs, delta)
    rule = rule_for(layer_of(module, inputs.shape[1:]))
    found = rule.invert(Estimate(outputs.detach(), torch.full_like(delta, 1e-4)), 0, [None], weights_of(module))
    torch.testing.assert_close(found.value, inputs.detach())
    (slope,) = torch.autograd.grad(module(inputs).sum(), inputs)
    torch.testing.assert_close(found.variance, 1e-4 / slope.square())
    torch.testing.assert_close(rule.carry(delta, 0, [None], None, weights_of(module)), carried)


def test_a_channel_whose_weight_is_zero_is_unknown():
    module = random_norm()
    module.weight.data[1] = 0
    inputs = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    outputs = module(inputs).detach()
    rule = rule_for(layer_of(module, (3, 2, 2)))
    found = rule.invert(Estimate(outputs, torch.zeros_like(outputs)), 0, [None], weights_of(module))
    assert torch.isfinite(found.value).all()
    assert torch.isinf(found.variance[:, 1]).all()
    torch.testing.assert_close(found.value[:, ::2], inputs[:, ::2])
    assert (found.variance[:, ::2] == 0).all()


def test_statistics_that_are_not_known_are_an_error():
    module = random_norm()
    weights = weights_of(module)
    del weights["running_var"]
    with pytest.raises(KeyError, match="running_var"):
        rule_for(layer_of(module, (3, 2, 2))).affine(weights)


def test_normalisation_by_the_batch_itself_is_named():
    with pytest.raises(ArchitectureError, match=r"batch_norm .*normalises by the batch that it is given"):
        rule_for(layer_of(nn.BatchNorm2d(3, track_running_stats=False), (3, 2, 2)))
