"""Activation functions from their output, against autograd."""

import pytest
import torch
from dense import layer_of
from torch import nn

from gitlight.errors import ArchitectureError
from gitlight.generators.exact import Estimate, rule_for

ONE_TO_ONE = [
    *(nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.1), nn.LeakyReLU(2.0), nn.LogSigmoid()),
    *(nn.ELU(), nn.ELU(0.3), nn.SELU(), nn.CELU(), nn.CELU(0.5), nn.Softplus(), nn.Softplus(4.0, 16.0)),
]
ONE_MINIMUM = [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish()]
CLIPPED = [nn.Hardtanh(), nn.Hardtanh(-0.5, 2.0), nn.ReLU6(), nn.Hardsigmoid()]
INPUTS = torch.linspace(-4, 4, 80, dtype=torch.float64).view(2, 40)


def rule_of(module, n=40):
    return rule_for(layer_of(module, (n,)))


def through(module, inputs=INPUTS):
    """The outputs, and their slopes by autograd."""
    inputs = inputs.clone().requires_grad_()
    outputs = module(inputs)
    (slopes,) = torch.autograd.grad(outputs.sum(), inputs)
    return outputs.detach(), slopes


def known(values, variance=0.0):
    return Estimate(values, torch.full_like(values, variance))


@pytest.mark.parametrize("module", ONE_TO_ONE, ids=repr)
def test_the_input_and_its_error_follow_from_the_output(module):
    outputs, slopes = through(module)
    found = rule_of(module).invert(known(outputs, 1e-8), 0, [None], {})
    torch.testing.assert_close(found.value, INPUTS)
    torch.testing.assert_close(found.variance, 1e-8 / slopes.square())
    assert found.at_most is None


@pytest.mark.parametrize("module", [*ONE_TO_ONE, *CLIPPED, nn.ReLU(), nn.ReLU(inplace=True)], ids=repr)
def test_delta_passes_as_autograd_says(module):
    outputs, slopes = through(nn.ReLU() if isinstance(module, nn.ReLU) else module)
    delta = torch.randn_like(outputs)
    torch.testing.assert_close(rule_of(module).carry(delta, 0, [None], known(outputs), {}), delta * slopes)


@pytest.mark.parametrize("module", ONE_MINIMUM, ids=repr)
def test_above_the_minimum_input_and_slope_follow_from_the_output(module):
    rising = INPUTS[INPUTS > -0.7].unsqueeze(0)
    outputs, slopes = through(module, rising)
    rule = rule_of(module, rising.shape[1])
    found = rule.invert(known(outputs, 1e-8), 0, [None], {})
    torch.testing.assert_close(found.value, rising)
    positive = outputs > 0
    torch.testing.assert_close(found.variance[positive], 1e-8 / slopes[positive].square())
    assert torch.isinf(found.variance[~positive]).all(), "one of two inputs"
    delta = torch.randn_like(outputs)
    torch.testing.assert_close(rule.carry(delta, 0, [None], known(outputs), {}), delta * slopes)


@pytest.mark.parametrize("module", ONE_MINIMUM, ids=repr)
def test_below_the_minimum_the_larger_of_two_inputs_is_given(module):
    outputs, _ = through(module, torch.linspace(-6, -1.5, 30, dtype=torch.float64).unsqueeze(0))
    found = rule_of(module, 30).invert(known(outputs), 0, [None], {}).value
    torch.testing.assert_close(module(found), outputs)
    assert (through(module, found)[1] > 0).all(), "on the rising branch"


@pytest.mark.parametrize("module", ONE_MINIMUM, ids=repr)
def test_an_output_that_noise_put_below_the_minimum_stays_finite(module):
    rule = rule_of(module, 3)
    outputs = torch.tensor([[-0.5, -1e3, 0.0]], dtype=torch.float64)
    found = rule.invert(known(outputs), 0, [None], {}).value
    assert torch.isfinite(found).all()
    # The slope vanishes there, so the place of the minimum is known to half of the digits.
    assert abs(through(module, found[:, :1])[1].item()) < 1e-6
    assert torch.isfinite(rule.carry(torch.ones_like(outputs), 0, [None], known(outputs), {})).all()


def test_relu_gives_units_that_are_on_and_a_bound_for_the_others():
    outputs, _ = through(nn.ReLU())
    found = rule_of(nn.ReLU()).invert(known(outputs, 1e-8), 0, [None], {})
    on = INPUTS > 0
    assert torch.equal(found.at_most, ~on)
    torch.testing.assert_close(found.value, INPUTS.clamp_min(0))
    assert (found.variance[on] == 1e-8).all()
    assert torch.isinf(found.variance[~on]).all()


@pytest.mark.parametrize("module", CLIPPED, ids=repr)
def test_a_clipped_unit_is_known_between_its_bounds_and_bounded_below(module):
    outputs, slopes = through(module)
    found = rule_of(module).invert(known(outputs, 1e-12), 0, [None], {})
    between, below = slopes > 0, (slopes == 0) & (INPUTS < 0)
    torch.testing.assert_close(found.value[between], INPUTS[between])
    torch.testing.assert_close(found.variance[between], (1e-12 / slopes.square())[between])
    assert torch.isinf(found.variance[~between]).all()
    assert torch.equal(found.at_most, below)
    assert (INPUTS[below] <= found.value[below]).all()


def test_a_bound_that_is_far_beyond_all_values_bounds_nothing():
    outputs = INPUTS.clamp_min(0)
    found = rule_of(nn.Hardtanh(0.0, 1e9)).invert(known(outputs), 0, [None], {})
    assert torch.equal(torch.isinf(found.variance), INPUTS <= 0)
    assert torch.equal(found.at_most, INPUTS <= 0)


def test_a_softplus_that_jumps_has_no_rule():
    with pytest.raises(ArchitectureError, match="threshold=5: it jumps there"):
        rule_of(nn.Softplus(2.0, threshold=5.0))


def test_relu_units_within_their_error_are_off():
    outputs = torch.tensor([[1.0, 0.03, 0.01, 1e-9, -0.5]], dtype=torch.float64)
    rule = rule_of(nn.ReLU(), 5)
    assert rule.on(known(outputs, 1e-4)).tolist() == [[True, True, False, False, False]]
    assert rule.on(known(outputs)).tolist() == [[True, True, True, False, False]], "1e-9 of the largest is rounding"
    assert rule.on(known(torch.zeros(1, 5, dtype=torch.float64))).tolist() == [[False] * 5]


BOUNDED = [
    *((nn.Sigmoid(), (0.0, 1.0)), (nn.Tanh(), (-1.0, 1.0)), (nn.ELU(), (-1.0, -1.0)), (nn.SELU(), (-1.7580994, -1.8))),
    *((nn.CELU(0.5), (-0.5, -0.5)), (nn.Softplus(2.0), (0.0, 0.0)), (nn.LogSigmoid(), (0.0, 0.0))),
]


@pytest.mark.parametrize(("module", "bounds"), BOUNDED, ids=repr)
def test_saturated_outputs_stay_finite_and_count_where_they_do_harm(module, bounds):
    rule = rule_of(module, 4)
    low, high = bounds
    sign = -1 if isinstance(module, nn.LogSigmoid) else 1  # the bound is above
    outputs = torch.tensor([[low, high, low - sign * 1e-3, 0.4 * sign], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    outputs[1] *= sign
    found = rule.invert(known(outputs, 1e-20), 0, [None], {})
    assert torch.isfinite(found.value).all()
    assert torch.isfinite(rule.carry(torch.ones_like(outputs), 0, [None], known(outputs), {})).all()
    assert (found.variance[0, :3] > 1e3).all(), "an error grows by the vanishing slope"
    if isinstance(module, nn.Sigmoid | nn.Tanh):  # of the others none is, see `exponential`
        assert rule.saturated(known(outputs, 1e-20)).tolist() == [0.75, 0.0]


def test_an_error_as_large_as_the_distance_to_the_bound_is_saturation():
    outputs = torch.tensor([[0.001, 0.5, 0.5, 0.999]], dtype=torch.float64)
    assert rule_of(nn.Sigmoid(), 4).saturated(known(outputs, 1e-4)).item() == 0.5
    assert rule_of(nn.LeakyReLU(0.1), 4).saturated(known(outputs, 1e-4)).item() == 0.0


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_a_leaky_relu_that_is_not_one_to_one_is_named(slope):
    with pytest.raises(ArchitectureError, match=r"leaky_relu .*negative_slope=.*above zero"):
        rule_of(nn.LeakyReLU(slope))
