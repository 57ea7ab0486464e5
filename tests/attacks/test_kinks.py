"""The second derivative of ReLUs: what it leaves alone, what it is, and what it is good for."""

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.kinks import spread_kinks

SHAPE, N_CLASSES = (3, 6, 6), 4


def leaked_function(*middle):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 4096), *middle, nn.Linear(4096, N_CLASSES)).double()
    values = {key: value.detach() for key, value in network.named_parameters()}
    return LeakedFunction(Architecture.of(network, SHAPE, N_CLASSES), values)


def an_image():
    torch.manual_seed(1)
    return torch.rand(2, *SHAPE, dtype=torch.float64), torch.eye(N_CLASSES, dtype=torch.float64)[[1, 3]]


@pytest.mark.parametrize("kink", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2)])
def test_gradients_stay_as_they_are(kink):
    function, (images, targets) = leaked_function(kink), an_image()
    wanted = function.gradient(images, targets)
    found = function.with_kinks_spread(0.1).gradient(images, targets)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("kink", "area"), [(nn.ReLU(), 1.0), (nn.LeakyReLU(0.2), 0.8)])
def test_the_second_derivative_is_a_logistic_density(kink, area):
    (layer,) = spread_kinks(Architecture.of(nn.Sequential(kink), SHAPE, 6), 0.25).layers
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    width = 0.25 * x.square().mean().sqrt()

    def slope(x):
        return torch.func.grad(lambda x: layer.apply([x], {}).sum())(x)

    second = torch.func.grad(lambda x: slope(x).sum())(x)
    density = 1 / (4 * width * torch.cosh(x / (2 * width)).square())
    torch.testing.assert_close(second, area * density)
    torch.testing.assert_close(torch.trapezoid(second, x), torch.tensor(area).double(), rtol=5e-3, atol=0)


def test_layers_without_kinks_and_a_width_of_zero_change_nothing():
    architecture = Architecture.of(nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Sigmoid()), SHAPE, N_CLASSES)
    assert spread_kinks(architecture, 0.1) == architecture
    assert spread_kinks(architecture, 0.0) is architecture


def test_the_change_of_a_gradient_is_predicted_with_the_units_that_switch():
    """What a hidden unit's bias gets changes mostly when the unit switches; among thousands some always do."""
    function, (images, targets) = leaked_function(nn.ReLU()), an_image()
    torch.manual_seed(2)
    way = 0.5 * torch.randn_like(images)
    theirs = function.gradient(images + way, targets)["1.bias"]

    def distance(images, function):
        return (function.gradient(images, targets)["1.bias"] - theirs).square().sum()

    measured = (distance(images + 0.05 * way, function) - distance(images - 0.05 * way, function)) / 0.1
    predicted = {
        width: (torch.func.grad(distance)(images, function.with_kinks_spread(width)) * way).sum()
        for width in (0.0, 0.05)
    }
    assert (predicted[0.05] - measured).abs() < 0.1 * measured.abs()
    assert (predicted[0.0] - measured).abs() > 0.5 * measured.abs()
