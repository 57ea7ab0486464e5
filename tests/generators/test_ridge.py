import numpy as np
import pytest
import torch

from gitlight.errors import DataError
from gitlight.generators.ridge import STRENGTHS, RidgeRegression

N, N_FEATURES, N_OUTPUTS = 200, 12, 5


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, N_FEATURES, dtype=torch.float64, generator=generator) * 10 ** torch.linspace(-3, 3, 12)
    features = features.double() + 7
    outputs = torch.tanh(features @ torch.randn(N_FEATURES, N_OUTPUTS, dtype=torch.float64, generator=generator) / 1e3)
    return features, outputs + 0.1 * torch.randn(N, N_OUTPUTS, dtype=torch.float64, generator=generator) + 2


def by_hand(features, outputs, strength, new):
    """Ridge regression by a dense least-squares solve with the penalty as extra rows."""
    mean, deviation = features.mean(0), features.std(0, ddof=0)
    design = np.hstack([(features - mean) / deviation, np.ones((len(features), 1))])
    penalty = np.sqrt(len(features) * strength) * np.eye(design.shape[1])
    penalty[-1] = 0
    rows = np.vstack([design, penalty])
    right = np.vstack([outputs, np.zeros((len(penalty), outputs.shape[1]))])
    solution = np.linalg.lstsq(rows, right, rcond=None)[0]
    return np.hstack([(new - mean) / deviation, np.ones((len(new), 1))]) @ solution


def fitted(features, outputs, batches=1):
    ridge = RidgeRegression(N_FEATURES, N_OUTPUTS)
    for rows in torch.arange(len(features)).chunk(batches):
        ridge.add(features[rows], outputs[rows], rows)
    ridge.solve()
    return ridge


def test_it_is_ridge_regression_at_the_strength_it_chose(data):
    features, outputs = data
    ridge = fitted(features, outputs)
    new = torch.randn(7, N_FEATURES, dtype=torch.float64) + 7
    wanted = by_hand(features.numpy(), outputs.numpy(), float(ridge.strength), new.numpy())
    np.testing.assert_allclose(ridge(new).numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_it_chooses_the_strength_with_the_least_error_on_the_pairs_held_out(data):
    features, outputs = data
    held_out = torch.arange(N) % 10 == 0
    errors = []
    for strength in STRENGTHS:
        found = by_hand(features[~held_out].numpy(), outputs[~held_out].numpy(), strength, features[held_out].numpy())
        errors.append(((found - outputs[held_out].numpy()) ** 2).sum())
    chosen = STRENGTHS.index(float(fitted(features, outputs).strength))
    # Standardisation over all pairs, not over the kept ones, may tip a near tie; never more.
    assert errors[chosen] <= 1.01 * min(errors)


def test_batches_and_their_order_do_not_matter(data):
    features, outputs = data
    whole = fitted(features, outputs)
    parts = fitted(features, outputs, batches=9)
    torch.testing.assert_close(parts.coefficients, whole.coefficients)
    assert parts.strength == whole.strength


def test_pairs_that_cannot_be_fitted_are_an_error(data):
    features, outputs = data
    ridge = RidgeRegression(N_FEATURES, N_OUTPUTS)
    ridge.add(features[:3], outputs[:3], torch.tensor([0, 10, 20]))
    with pytest.raises(DataError, match=r"0 pairs to fit on and 3 held out.*data\.n_public_images"):
        ridge.solve()


def test_a_feature_that_never_varies_is_ignored(data):
    features, outputs = data
    features[:, 3] = 1.5
    ridge = fitted(features, outputs)
    new = features[:5].clone()
    before = ridge(new)
    new[:, 3] = 1e6
    assert torch.equal(ridge(new), before)
    assert torch.isfinite(before).all()


def test_features_that_vary_by_rounding_alone_are_ignored(data):
    """As closed forms make of pruned gradients: logarithms of what is next to nothing."""
    features, outputs = data
    generator = torch.Generator().manual_seed(1)
    nearly = -27.6 + 1e-7 * torch.randn(N, 40, dtype=torch.float64, generator=generator)
    without, with_them = RidgeRegression(N_FEATURES, N_OUTPUTS), RidgeRegression(N_FEATURES + 40, N_OUTPUTS)
    without.add(features, outputs, torch.arange(N))
    with_them.add(torch.cat([features, nearly], dim=1), outputs, torch.arange(N))
    without.solve()
    with_them.solve()
    torch.testing.assert_close(with_them(torch.cat([features, nearly], dim=1)), without(features), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("n_weighed", [0, 3])
def test_a_feature_that_is_not_finite_is_named(data, bad, n_weighed):
    features, outputs = data
    features[5, 3] = bad
    ridge = RidgeRegression(N_FEATURES, N_OUTPUTS, n_weighed)
    ridge.add(features, outputs, torch.arange(N))
    with pytest.raises(DataError, match="features or images of some pairs are not finite"):
        ridge.solve()


@pytest.mark.parametrize("which", ["all", "the first", "the others"])
def test_features_count_only_where_they_help_on_the_pairs_held_out(data, which):
    features, outputs = data
    others = torch.randn(N, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if which == "all":
        outputs = outputs + 3 * others[:, :N_OUTPUTS]
    first, second = (features, others) if which == "the first" else (others, features)
    both = torch.cat([first, second], dim=1)
    used = both if which == "all" else features
    ridge = RidgeRegression(both.shape[1], N_OUTPUTS, n_weighed=first.shape[1])
    ridge.add(both, outputs, torch.arange(N))
    ridge.solve()
    expected = by_hand(used.numpy(), outputs.numpy(), float(ridge.strength), used.numpy())
    np.testing.assert_allclose(ridge(both).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_features_that_do_not_help_are_left_out(data):
    features, outputs = data
    useless = torch.randn(N, 150, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weighed, alone = RidgeRegression(N_FEATURES + 150, N_OUTPUTS, N_FEATURES), RidgeRegression(N_FEATURES, N_OUTPUTS)
    both = torch.cat([features, useless], dim=1)
    for regression, given in ((weighed, both), (alone, features)):
        regression.add(given, outputs, torch.arange(N))
        regression.solve()
    assert weighed.deviation[N_FEATURES:].isinf().all()
    torch.testing.assert_close(weighed(both), alone(features), rtol=1e-6, atol=1e-6)
