"""Descent on the equations of all layers."""

from dataclasses import replace

import pytest
import torch
from closed_form import run_fits
from torch import nn

from gitlight.architecture import Architecture
from gitlight.callbacks.weight_distance import weight_distances
from gitlight.config import ExactGeneratorConfig, LeNetConfig
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.generator import ExactGenerator
from gitlight.generators.exact.layer_descent import _damped_inverse, _Preconditioned

DESCENT = ExactGeneratorConfig(fit="descent", objective="layers")


def parameters_of(leaked):
    return {name: value.detach().double() for name, value in leaked.network.named_parameters()}


def with_weights(generator, values):
    with torch.no_grad():
        for key, parameter in generator.trained.items():
            parameter.copy_(values[key.replace("/", ".")])
    return generator


@pytest.mark.parametrize("activation", ["sigmoid", "leaky_relu"])
def test_the_leaked_weights_leave_no_residual(make_pairs, activation):
    leaked, pair = make_pairs(LeNetConfig(width=4, activation=activation), n=40)
    generator = with_weights(ExactGenerator(leaked.architecture, DESCENT), parameters_of(leaked))
    assert generator.training_loss(pair.gradients, pair.images).item() < 1e-12
    with torch.no_grad():
        generator.trained["conv3/weight"][0, 0, 0, 0] += 0.1
    assert generator.training_loss(pair.gradients, pair.images).item() > 1e-6


def test_a_preconditioned_step_solves_least_squares():
    rows = torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    targets = torch.randn(50, 2, dtype=torch.float64)
    weight = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    inverse = _damped_inverse((rows.T @ rows / 50).unsqueeze(0), 0.0)
    made = rows @ _Preconditioned.apply(weight, inverse).T
    ((made - targets).square().sum() / 100).backward()
    wanted = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(weight.detach() - weight.grad, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_from_a_random_start_the_weights_converge(make_pairs):
    torch.manual_seed(0)
    leaked, pair = make_pairs(LeNetConfig(width=4), n=120)
    generator = run_fits(ExactGenerator(leaked.architecture, DESCENT), [pair])
    truth = parameters_of(leaked)
    start = weight_distances(generator.estimated_parameters(), truth)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        generator.training_loss(pair.gradients, pair.images).backward()
        optimizer.step()
    end = weight_distances(generator.estimated_parameters(), truth)
    assert start["total_relative"] > 0.9
    for name in truth:
        assert end[f"{name}_relative"] < 0.1, name


def without_use(pair, factor):
    return replace(pair, gradients={name: factor * gradient for name, gradient in pair.gradients.items()})


def test_shares_have_the_loss_and_gradient_of_the_whole(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=24)
    torch.manual_seed(0)
    # Without noise, moments have a condition of 1e10, and what a processor rounds decides the sixth digit.
    noisy = {name: g + 1e-4 * g.std() * torch.randn_like(g) for name, g in pair.gradients.items()}
    pair = replace(pair, gradients=noisy)
    numbers = [slice(0, 10), slice(10, 24)]
    parts = [({name: g[part] for name, g in pair.gradients.items()}, pair.images[part]) for part in numbers]
    # Shares that say nothing count for nothing.
    empty = [(without_use(pair, factor).gradients, pair.images) for factor in (0.0, torch.nan)]
    found = []
    for shares in ([(pair.gradients, pair.images)], parts, [*parts, *empty]):
        torch.manual_seed(0)
        generator = ExactGenerator(leaked.architecture, DESCENT)
        loss = generator.coupled_loss(shares)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in generator.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-13)


def test_a_batch_without_a_usable_leak_adds_nothing_to_fits(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=120)
    weights = []
    for batches in ([pair], [without_use(pair, 0.0), pair, without_use(pair, torch.nan)]):
        generator = run_fits(ExactGenerator(leaked.architecture, ExactGeneratorConfig()), batches)
        weights.append({name: one.value for name, one in generator.estimated_parameters().items()})
    torch.testing.assert_close(weights[1], weights[0])


def test_the_state_goes_on_where_it_was(make_pairs):
    torch.manual_seed(0)
    leaked, pair = make_pairs(LeNetConfig(width=4), n=20)
    generator = ExactGenerator(leaked.architecture, DESCENT)
    generator.training_loss(pair.gradients, pair.images)
    other = ExactGenerator(leaked.architecture, DESCENT)
    other.load_state_dict(generator.state_dict())
    losses = [one.training_loss(pair.gradients, pair.images) for one in (generator, other)]
    assert int(other.layer_descent.taken) == 2
    torch.testing.assert_close(losses[0], losses[1])


def test_a_weight_without_equations_is_named():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.GELU(),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(576, 5),
    )
    with pytest.raises(ArchitectureError, match=r"generator.objective: layers needs equations.*'?0"):
        ExactGenerator(Architecture.of(model, (3, 16, 16), 5), DESCENT)
