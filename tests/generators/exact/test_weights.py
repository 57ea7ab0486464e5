"""Fits from pairs, against dense least squares and true weights."""

import logging

import pytest
import torch
from dense import relative
from hypothesis import given
from hypothesis import strategies as st
from small_layers import quick
from torch import nn

from gitlight.errors import DataError
from gitlight.generators.exact.weights import AffineFit, LeastSquares, LogitFit, log_probabilities_of, solve_all
from gitlight.virtual_ranks import Share, working_on

EPSILON = torch.finfo(torch.float64).eps


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(
    st.integers(1, 8), st.integers(1, 3), st.lists(st.integers(1, 60), min_size=1, max_size=5), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_equations_in_batches_are_solved_as_all_at_once(unknowns, sides, batches, weighted, seed):
    total = sum(batches) + unknowns
    rows, targets = random(total, unknowns, seed=seed), random(total, sides, seed=seed + 1)
    weights = random(total, seed=seed + 2).square() if weighted else torch.ones(total).double()
    squares = LeastSquares()
    for part in torch.arange(total).split([*batches, unknowns]):
        squares.add(rows[part], targets[part], weights[part] if weighted else None)
    found, determined = squares.solve("the test's weights")
    root = weights.sqrt().unsqueeze(1)
    wanted = torch.linalg.lstsq(root * rows, root * targets, driver="gelsd").solution
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    assert determined.all()


def test_without_any_equation_the_message_says_whose_pairs_were_of_no_use():
    with pytest.raises(DataError, match=r"none of the public pairs can be used: .* zero or not finite"):
        LeastSquares().sums()
    with working_on(Share(1, 4)), pytest.raises(DataError, match=r"none of the public pairs in part 2 of 4 can"):
        LeastSquares().sums()


def test_an_ill_conditioned_problem_keeps_eight_digits():
    left, right = (torch.linalg.qr(random(*shape))[0] for shape in ((400, 20), (20, 20)))
    rows = left * torch.logspace(0, -7, 20, dtype=torch.float64) @ right.T
    truth = random(20, 2, seed=1)
    squares = LeastSquares()
    for part in rows.split(90):
        squares.add(part, part @ truth)
    assert relative(squares.solve("them")[0], truth) < 1e-8


def test_unknowns_of_any_size_count_alike():
    sizes = torch.logspace(-6, 6, 5, dtype=torch.float64)
    rows, truth = random(30, 5), random(5, 1, seed=1)
    squares = LeastSquares()
    squares.add(rows * sizes, rows @ truth)
    found, determined = squares.solve("them")
    assert determined.all()
    torch.testing.assert_close(found * sizes[:, None], truth)


def test_unknowns_that_equations_leave_open_are_flagged():
    rows = random(40, 6)
    rows[:, 1] = 0  # never occurs
    rows[:, 4] = -2 * rows[:, 3]  # only 3 less twice 4 is seen
    truth = random(6, 2, seed=1)
    squares = LeastSquares()
    squares.add(rows, rows @ truth)
    found, determined = squares.solve("them")
    assert determined.tolist() == [True, False, True, False, False, True]
    torch.testing.assert_close(found[determined], truth[determined])
    assert (found[1] == 0).all()
    torch.testing.assert_close(rows @ found, rows @ truth)


def test_fewer_equations_than_unknowns_are_named(caplog):
    squares = LeastSquares()
    rows = random(9, 5)
    squares.add(rows, rows[:, :1], weights=torch.tensor([1.0, 1.0, 1.0] + [0.0] * 6))
    with caplog.at_level(logging.WARNING):
        found, determined = squares.solve("the weight of conv 'x'")
    assert "the weight of conv 'x': 3 equations for 5 unknowns" in caplog.text
    assert not determined.any()
    torch.testing.assert_close(rows[:3] @ found, rows[:3, :1])


def test_of_several_problems_the_worst_is_named_once(caplog):
    problems = [LeastSquares() for _ in range(3)]
    for count, squares in zip((3, 2, 7), problems, strict=True):
        squares.add(random(count, 5), random(count, 1))
    with caplog.at_level(logging.WARNING):
        solved = solve_all(problems, "the weight")
    assert [int(determined.sum()) for _, determined in solved] == [0, 0, 5]
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "closed-form fit of the weight: 2 equations for 5 unknowns"
    ]


def test_without_an_equation_that_counts_nothing_is_determined():
    squares = LeastSquares()
    squares.add(torch.zeros(3, 2), torch.zeros(3, 1))
    found, determined = squares.solve("them")
    assert (found == 0).all()
    assert not determined.any()


def test_a_solve_forgets_its_equations():
    squares = LeastSquares()
    for truth in (2.0, 3.0):
        squares.add(torch.ones(4, 1), torch.full((4, 1), truth))
        assert squares.solve("it")[0].item() == pytest.approx(truth)


def test_devices_add_up_to_all_their_equations(monkeypatch):
    rows, truth = random(20, 4), random(4, 2, seed=1)
    targets = rows @ truth + random(20, 2, seed=2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    devices, sums = [], []
    for rank, part in enumerate((slice(0, 3), slice(3, 20))):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        devices.append(LeastSquares())
        devices[-1].add(rows[part], targets[part])
        sums.append(devices[-1].sums())
    for ours, theirs in zip(*sums, strict=True):
        ours += theirs  # what an all-reduce does
    torch.testing.assert_close(devices[0].solve("them")[0], torch.linalg.lstsq(rows, targets).solution)


def test_an_affine_fit_is_weighted_least_squares_with_a_column_of_ones():
    patches, outputs, weights = random(20, 3, 4), random(20, 3, 2, seed=1), random(20, 3, seed=2).square()
    fit = AffineFit()
    for part in (slice(0, 5), slice(5, 20)):
        fit.add(patches[part], outputs[part], weights[part])
    values, seen = fit.solve("them")
    root = weights.sqrt().unsqueeze(2)
    design = torch.cat([patches, torch.ones(20, 3, 1)], dim=2)
    wanted = torch.linalg.lstsq((design * root).flatten(0, 1), (outputs * root).flatten(0, 1)).solution
    torch.testing.assert_close(values["weight"], wanted[:-1].T)
    torch.testing.assert_close(values["bias"], wanted[-1])
    assert seen["weight"].shape == (2, 4)
    assert seen["weight"].all()
    assert seen["bias"].all()


def softmax_layer(n, features, classes, scale=1.0, seed=0):
    """Inputs, δ of a cross-entropy by autograd, and the true weight and bias, less their means over classes."""
    torch.manual_seed(seed)
    layer = nn.Linear(features, classes).double()
    inputs, labels = torch.randn(n, features).double(), torch.randint(classes, (n,))
    logits = (scale * layer(inputs)).detach().requires_grad_()
    (delta,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), logits)
    weight, bias = (scale * parameter.detach() for parameter in (layer.weight, layer.bias))
    return inputs, delta, weight - weight.mean(dim=0), bias - bias.mean(), logits.detach()


@quick
@given(st.integers(2, 6), st.integers(1, 8), st.sampled_from([1.0, 10.0]), st.integers(0, 99))
def test_a_softmax_layers_weight_is_found_up_to_a_common_row(classes, features, scale, seed):
    inputs, delta, weight, bias, _ = softmax_layer(60, features, classes, scale, seed)
    fit = LogitFit(classes)
    for part in (slice(0, 20), slice(20, 60)):
        fit.add(inputs[part], delta[part], torch.zeros(len(inputs[part])).double(), EPSILON)
    found = fit.solve()
    assert relative(found[0], weight) < 1e-9
    torch.testing.assert_close(found[1], bias, rtol=1e-8, atol=1e-8 * scale)
    assert found[2].all()


def test_probabilities_of_1e_100_are_as_good_as_any():
    torch.manual_seed(0)
    weight, inputs = torch.randn(4, 3).double(), torch.randn(100, 3).double()
    # Two classes share nearly all of the probability, and one of them is the label.
    bias = torch.tensor([0.0, 0.0, -230.0, -250.0]).double()
    logits = (inputs @ weight.T + bias).requires_grad_()
    loss = nn.functional.cross_entropy(logits, torch.randint(2, (100,)), reduction="sum")
    (delta,) = torch.autograd.grad(loss, logits)
    assert delta[:, 2].max() < 1e-90
    fit = LogitFit(4)
    fit.add(inputs, delta, torch.zeros(100).double(), EPSILON)
    found_weight, found_bias, _ = fit.solve()
    assert relative(found_weight, weight - weight.mean(dim=0)) < 1e-9
    assert relative(found_bias, bias - bias.mean()) < 1e-9


def test_noise_is_weighed_down_where_it_drowns_probabilities():
    inputs, delta, weight, _, _ = softmax_layer(3000, 5, 4, scale=3.0)
    noisy = delta + 1e-3 * random(*delta.shape, seed=1)
    fit = LogitFit(4)
    fit.add(inputs, noisy, torch.full((3000,), 1e-3).double(), EPSILON)
    assert relative(fit.solve()[0], weight) < 0.02


def test_leaks_that_are_not_finite_count_for_nothing():
    inputs, delta, weight, _, _ = softmax_layer(60, 5, 4)
    inputs[0, 0], delta[1, 0] = torch.nan, torch.nan
    fit = LogitFit(4)
    fit.add(inputs, delta, torch.zeros(60).double(), EPSILON)
    assert relative(fit.solve()[0], weight) < 1e-10


def test_features_that_are_always_zero_are_not_determined():
    inputs, _, weight, _, _ = softmax_layer(60, 5, 3)
    inputs[:, 2] = 0
    logits = inputs @ weight.T
    delta = logits.softmax(dim=1) - nn.functional.one_hot(torch.zeros(60, dtype=torch.int64), 3)
    fit = LogitFit(3)
    fit.add(inputs, delta, torch.zeros(60).double(), EPSILON)
    assert fit.solve()[2].tolist() == [True, True, False, True, True]


@quick
@given(st.integers(2, 8), st.sampled_from([1.0, 5.0]), st.integers(0, 99))
def test_log_probabilities_follow_from_delta(classes, scale, seed):
    *_, delta, _, _, logits = softmax_layer(20, 4, classes, scale, seed)
    found, variance = log_probabilities_of(delta, torch.zeros(20).double(), EPSILON)
    error = (found - logits.log_softmax(dim=1)).abs()
    known = torch.isfinite(variance)
    assert known.double().mean() > 0.9
    assert (error[known] <= 20 * variance[known].sqrt() + 20 * EPSILON * found[known].abs()).all()


def test_the_variance_is_that_of_noise_over_probability():
    *_, delta, _, _, logits = softmax_layer(1, 4, 3)
    noisy = delta + 1e-4 * random(20000, 3, seed=1)
    found, variance = log_probabilities_of(noisy, torch.full((20000,), 1e-4).double(), EPSILON)
    measured = (found - logits.log_softmax(dim=1)).square().mean(dim=0)
    torch.testing.assert_close(variance.mean(dim=0), measured, rtol=0.1, atol=0)


def test_what_rounding_has_taken_is_unknown():
    certain = torch.tensor([[0.0, 1e-20, 1e-21]])  # the label's probability was rounded to one
    hopeless = torch.tensor([[-1.0, 0.6, 0.4]])  # the label's probability was rounded to zero
    drowned = torch.tensor([[-0.5, 0.5, 0.0]])
    delta = torch.cat([certain, hopeless, drowned, torch.full((1, 3), torch.nan)]).double()
    found, variance = log_probabilities_of(delta, torch.zeros(4).double(), EPSILON)
    assert torch.isfinite(found).all()
    unknown = [[True] * 3, [True, False, False], [False, False, True], [True] * 3]
    assert torch.isinf(variance).tolist() == unknown
