"""Telling the images of a client batch apart by the last layer's gradient."""

from dataclasses import replace

import pytest
import torch
from closed_form import run_fits
from torch import nn
from torch.nn import functional

from gitlight.architecture import Architecture
from gitlight.config import HybridGeneratorConfig, LeNetConfig, ResNetConfig, SketchConfig
from gitlight.errors import ConfigError, DataError
from gitlight.generators.base import OfSingleImages
from gitlight.generators.exact import separation
from gitlight.generators.exact.features import LEVELS
from gitlight.generators.exact.separated import SeparatedFeatures, can_separate, is_separated_well
from gitlight.generators.exact.separation import Typical, separable, separate
from gitlight.generators.hybrid import HybridGenerator
from gitlight.gradients.sketch import Sketch
from gitlight.leaked.model import LeakedModel
from gitlight.metrics import match

N_CLASSES, N_FEATURES, N_LEAKS = 10, 30, 40


def leaks(n_images, seed=0, relative_noise=0.0):
    """Mean gradients of a linear layer, by autograd: its weights, inputs, labels, gradients and their noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    weight, bias = torch.randn(N_CLASSES, N_FEATURES, **draw) * 0.2, torch.randn(N_CLASSES, **draw)
    inputs = 0.5 + 0.3 * torch.randn(N_LEAKS, n_images, N_FEATURES, **draw)
    labels = torch.randint(N_CLASSES, (N_LEAKS, n_images), generator=generator)
    gradients = []
    for its_inputs, its_labels in zip(inputs, labels, strict=True):
        parameters = (weight.clone().requires_grad_(), bias.clone().requires_grad_())
        loss = functional.cross_entropy(functional.linear(its_inputs, *parameters), its_labels)
        gradients.append(torch.autograd.grad(loss, parameters))
    of_weight, of_bias = (torch.stack(each) for each in zip(*gradients, strict=True))
    noise = relative_noise * of_weight.square().mean(dim=(1, 2)).sqrt()
    of_weight = of_weight + noise[:, None, None] * torch.randn(of_weight.shape, **draw)
    of_bias = of_bias + noise[:, None] * torch.randn(of_bias.shape, **draw)
    probabilities = torch.softmax(functional.linear(inputs, weight, bias), dim=2).mean(dim=(0, 1))
    typical = Typical(inputs.mean(dim=(0, 1)), inputs.flatten(0, 1).var(dim=0).mean().sqrt(), probabilities)
    common = torch.randn(N_FEATURES, **draw)  # a row that no gradient shows
    return weight + common, bias + 1.0, typical, inputs, labels, of_weight, of_bias, noise.clamp_min(1e-14)


def errors(found, inputs, labels):
    """``(B, N)``: root mean square errors of the inputs, each next to the nearest true one of its own label."""
    distances = (found.inputs.unsqueeze(2) - inputs.unsqueeze(1)).square().mean(dim=3).sqrt()
    other = found.labels.unsqueeze(2) != labels.unsqueeze(1)
    return distances.masked_fill(other, torch.inf).min(dim=2).values


@pytest.mark.parametrize("n_images", [2, 3, 4])
def test_images_of_a_batch_are_told_apart_exactly_also_where_they_share_a_label(n_images):
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(n_images)
    found = separate(of_weight, of_bias, noise, weight, bias, typical, n_images)
    assert torch.equal(found.labels, labels.sort(dim=1).values)
    worst = errors(found, inputs, labels).max(dim=1).values
    assert (worst < 1e-6).double().mean() >= 0.9
    shared = torch.tensor([len(set(row)) < n_images for row in labels.tolist()])
    assert shared.sum() >= 3
    assert (worst[shared] < 1e-6).double().mean() >= 0.7
    # No image is found twice.
    order = found.inputs.unsqueeze(2) - found.inputs.unsqueeze(1)
    apart = order.norm(dim=3)[:, ~torch.eye(n_images, dtype=torch.bool)]
    assert apart[worst < 1e-6].min() > 0.1


def test_stated_errors_are_those_under_noise():
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(2, relative_noise=1e-3)
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 2)
    distinct = labels[:, 0] != labels[:, 1]
    ratio = errors(found, inputs, labels)[distinct] / found.inputs_variance.sqrt()[distinct]
    assert 0.7 < ratio.median() < 1.4


def test_stated_errors_are_large_where_images_could_not_be_told_apart():
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(6, relative_noise=1e-2)
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 6)
    wrong = errors(found, inputs, labels)[found.labels == labels.sort(dim=1).values] > typical.spread
    stated = found.inputs_variance.sqrt()[found.labels == labels.sort(dim=1).values]
    assert wrong.any()
    assert (stated[wrong] > 0.1 * typical.spread).double().mean() > 0.9


def test_labels_are_read_off_where_one_class_has_nearly_all_probability():
    weight, bias, typical, inputs, labels, _, _, noise = leaks(4)
    bias = bias + 6.0 * functional.one_hot(torch.tensor(3), N_CLASSES)
    delta = torch.softmax(functional.linear(inputs, weight, bias), dim=2)
    typical = typical._replace(probabilities=delta.mean(dim=(0, 1)))
    delta = delta - functional.one_hot(labels, N_CLASSES)
    of_weight, of_bias = delta.mT @ inputs / 4, delta.mean(dim=1)
    labels_of_three = (labels == 3).any(dim=1)
    assert (of_bias[labels_of_three, 3] > 0).any()  # its entry is not the smallest, nor below zero
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 4)
    assert torch.equal(found.labels, labels.sort(dim=1).values)


def test_hybrid_gives_the_labels_that_it_reads_off(make_pairs):
    settings = LeNetConfig(width=4)
    leaked, pair = make_pairs(settings, n=60, client_batch_size=2)
    _, single = make_pairs(settings, n=400)
    chosen = HybridGeneratorConfig(channels=8, blocks=1, gradient_channels=2)
    generator = run_fits(HybridGenerator(leaked.architecture, chosen, 2), [pair], [single])
    assert torch.equal(generator.reconstruct(pair.gradients).labels, pair.labels.sort(dim=1).values)
    other = run_fits(HybridGenerator(leaked.architecture, replace(chosen, separate=False), 2), [pair], [single])
    assert other.reconstruct(pair.gradients).labels is None


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_a_leak_of_an_impossible_size_spoils_no_other(scale):
    weight, bias, typical, inputs, labels, of_weight, of_bias, noise = leaks(2)
    of_weight[0], of_bias[0] = of_weight[0] * scale, of_bias[0] * scale
    found = separate(of_weight, of_bias, noise, weight, bias, typical, 2)
    assert (errors(found, inputs, labels)[1:] < 1e-6).double().mean() > 0.9


def test_leaks_are_the_same_in_parts(monkeypatch):
    weight, bias, typical, _, _, of_weight, of_bias, noise = leaks(3)
    whole = separate(of_weight, of_bias, noise, weight, bias, typical, 3)
    monkeypatch.setattr(separation, "_MOST_AT_ONCE", 7 * 42 * 9)
    parts = separate(of_weight, of_bias, noise, weight, bias, typical, 3)
    torch.testing.assert_close(parts.inputs, whole.inputs, rtol=1e-6, atol=1e-6)
    assert torch.equal(parts.labels, whole.labels)
    assert len(separate(of_weight[:0], of_bias[:0], noise[:0], weight, bias, typical, 3).inputs) == 0


def test_the_jacobian_is_the_residuals_derivative():
    weight, bias, typical, _, _, of_weight, of_bias, noise = leaks(3)
    problems = []
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(separation, "_search", lambda problem, start: problems.append((problem, start)) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            separate(of_weight, of_bias, noise, weight, bias, typical, 3)
    ((problem, start),) = problems
    problem = problem._replace(doubt=torch.full_like(problem.doubt, 0.3))

    def of_one(number):
        one = problem.of(torch.tensor([number]))
        return torch.func.jacfwd(lambda found: one.residual(found.unsqueeze(0)).squeeze(0))(start[number])

    wanted = torch.stack([of_one(number).flatten(1) for number in range(4)])
    torch.testing.assert_close(problem.jacobian(start)[:4], wanted)


@pytest.mark.parametrize(
    ("n_images", "n_classes", "n_features", "can"),
    [(1, 10, 30, False), (2, 10, 30, True), (9, 10, 30, True), (10, 10, 30, False), (4, 10, 3, False)],
)
def test_more_images_than_equations_are_not_separable(n_images, n_classes, n_features, can):
    assert separable(n_images, n_classes, n_features) is can


@pytest.fixture
def separated(make_pairs):
    """Features of client batches of two on a LeNet with sigmoids, fitted; the leaked model and a pair."""
    settings = LeNetConfig(width=4)
    leaked, pair = make_pairs(settings, n=30, client_batch_size=2, seed=1)
    _, single = make_pairs(settings, n=400)
    features = SeparatedFeatures(leaked.architecture, None, 2)
    for fit in features.fits():
        fit.update(single.gradients, single.images, single.indices[:, 0])
        fit.finish()
    return features, leaked, pair


def test_the_feature_is_what_the_activation_below_the_last_layer_was_made_of(separated):
    features, leaked, pair = separated
    network = leaked.network.double()
    truth = network[:-3](pair.images.flatten(0, 1).double())  # without activation, flatten, linear
    found, levels = features(pair.gradients)
    assert features.features[0].result == "conv3"
    values = found[0].view(30, 2, -1)
    wanted = truth.view(30, 2, 1, 16, 4).movedim(2, 3)  # as images of 16 × 4, to be matched
    matched = match(values.view(30, 2, 1, 16, 4).float(), wanted.reshape(30, 2, 1, 16, 4).float())
    errors = (matched - wanted.reshape(matched.shape)).abs().flatten(1).max(dim=1).values
    assert (errors < 1e-3).double().mean() > 0.9
    assert levels.shape == (60, 2)


def test_the_last_layers_weights_are_found_up_to_a_common_row(separated):
    features, leaked, _ = separated
    found = features.estimated_parameters()["linear.weight"]
    assert found.up_to_common_row
    true = leaked.network[-1].weight.double()
    torch.testing.assert_close(found.value, true - true.mean(dim=0), rtol=1e-5, atol=1e-6)


def test_leaks_that_are_zero_or_not_finite_are_no_estimate_and_spoil_no_other(separated):
    features, _, pair = separated
    clean, _ = features(pair.gradients)
    spoiled = {name: gradient.clone() for name, gradient in pair.gradients.items()}
    for gradient in spoiled.values():
        gradient[3] = 0
    spoiled["conv1.bias"][5, 0] = float("nan")
    found, levels = features(spoiled)
    bad = torch.tensor([6, 7, 10, 11])
    assert not found[0][bad].any()
    assert (levels[bad] == LEVELS[1]).all()
    rest = torch.ones(60, dtype=torch.bool).index_fill(0, bad, False)
    torch.testing.assert_close(found[0][rest], clean[0][rest], rtol=1e-4, atol=1e-4)


def test_a_batch_without_a_usable_leak_is_no_error(separated):
    features, _, pair = separated
    found, levels = features({name: torch.zeros_like(gradient) for name, gradient in pair.gradients.items()})
    assert not found[0].any()
    assert (levels == LEVELS[1]).all()


def test_single_images_without_an_output_error_spoil_no_fit(make_pairs):
    settings = LeNetConfig(width=4)
    leaked, single = make_pairs(settings, n=400)
    clean, spoiled = (SeparatedFeatures(leaked.architecture, None, 2) for _ in range(2))
    for features, gradients in (
        (clean, {name: gradient[1:] for name, gradient in single.gradients.items()}),
        (
            spoiled,
            single.gradients | {"linear.bias": single.gradients["linear.bias"].index_fill(0, torch.tensor([0]), 0)},
        ),
    ):
        for fit in features.fits():
            fit.update(gradients, single.images, single.indices[:, 0])
            fit.finish()
    for name, wanted in clean.state_dict().items():
        torch.testing.assert_close(spoiled.state_dict()[name], wanted, msg=name)

    (fit,) = SeparatedFeatures(leaked.architecture, None, 2).fits()
    without = {name: torch.zeros_like(g) if name == "linear.bias" else g for name, g in single.gradients.items()}
    fit.update(without, single.images, single.indices[:, 0])
    with pytest.raises(DataError, match=r"generator\.separate=false"):
        fit.finish()


def test_what_is_the_whole_leaks_goes_to_each_of_its_own_images(make_pairs):
    settings = LeNetConfig(width=4)
    leaked, pair = make_pairs(settings, n=60, client_batch_size=2)
    _, single = make_pairs(settings, n=400)
    chosen = HybridGeneratorConfig(channels=8, blocks=1, gradient_channels=2)
    generator = run_fits(HybridGenerator(leaked.architecture, chosen, 2), [pair], [single])
    nn.init.normal_(generator.refinement.leave.weight, std=0.1)
    whole = generator(pair.gradients)
    for number in (0, 1, 7):
        alone = generator({name: gradient[number : number + 1] for name, gradient in pair.gradients.items()})
        torch.testing.assert_close(alone[0], whole[number], rtol=1e-4, atol=1e-4)


def test_the_second_regression_is_of_single_images(make_pairs):
    settings = LeNetConfig(width=4)
    leaked, pair = make_pairs(settings, n=300, client_batch_size=2)
    _, single = make_pairs(settings, n=600)
    chosen = HybridGeneratorConfig(channels=8, blocks=1, gradient_channels=2)
    generator = HybridGenerator(leaked.architecture, chosen, 2)
    errors = []
    for fit in generator.fits():
        (used,) = [single] if isinstance(fit, OfSingleImages) else [pair]
        fit.update(used.gradients, used.images, used.indices[:, 0] // used.images.shape[1])
        fit.finish()
        errors.append((match(generator.start(pair.gradients), pair.images) - pair.images).square().mean())
    assert len(errors) == 3
    assert errors[2] < errors[1]


def test_training_lowers_the_error_of_separated_images(make_pairs):
    settings = LeNetConfig(width=4)
    leaked, pair = make_pairs(settings, n=150, client_batch_size=2)
    _, single = make_pairs(settings, n=400)
    _, other = make_pairs(settings, n=150, client_batch_size=2, seed=1)
    chosen = HybridGeneratorConfig(channels=8, blocks=1, gradient_channels=2)
    torch.manual_seed(0)
    generator = run_fits(HybridGenerator(leaked.architecture, chosen, 2), [pair], [single])
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = (match(generator(other.gradients), other.images) - other.images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in generator.parameters())


def test_hybrid_starts_from_each_images_own_features(make_pairs):
    settings = LeNetConfig(width=4)
    leaked, pair = make_pairs(settings, n=400, client_batch_size=2)
    _, single = make_pairs(settings, n=800)
    _, other = make_pairs(settings, n=40, client_batch_size=2, seed=1)
    errors = {}
    for separate_images in (None, False):
        chosen = HybridGeneratorConfig(channels=8, blocks=1, gradient_channels=2, separate=separate_images)
        generator = run_fits(HybridGenerator(leaked.architecture, chosen, 2), [pair], [single])
        start = generator.start(other.gradients)
        assert start.shape == other.images.shape
        errors[separate_images] = (match(start, other.images) - other.images).square().mean()
    assert errors[None] < 0.75 * errors[False]


def test_what_cannot_be_separated_is_an_error_where_it_is_asked_for(lenet_architecture):
    assert can_separate(lenet_architecture, 4)
    assert not can_separate(lenet_architecture, 5)  # five classes
    assert [is_separated_well(lenet_architecture, n) for n in (1, 2, 3, 4)] == [False, True, False, False]
    assert HybridGenerator(lenet_architecture, HybridGeneratorConfig(separate=True), 4).walk.n_slots == 4
    assert HybridGenerator(lenet_architecture, HybridGeneratorConfig(), 4).walk.n_slots == 1
    settings = HybridGeneratorConfig(separate=True)
    with pytest.raises(ConfigError, match=r"generator\.separate.*5 images.*generator\.separate=null"):
        HybridGenerator(lenet_architecture, settings, 5)
    assert HybridGenerator(lenet_architecture, HybridGeneratorConfig(), 5).walk.n_slots == 1


def test_many_classes_and_images_would_take_too_long():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 100))
    architecture = Architecture.of(network, (3, 4, 4), 100)
    assert can_separate(architecture, 8)
    assert not can_separate(architecture, 32)


def test_other_last_layers_and_batch_statistics_are_not_separable(lenet_architecture):
    without_bias = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False))
    assert not can_separate(Architecture.of(without_bias, (3, 2, 2), 5), 2)
    statistics = LeakedModel(ResNetConfig(width=4, batch_norm="batch"), (3, 16, 16), 5).architecture
    assert not can_separate(statistics, 2)
    sketched = Sketch(lenet_architecture, SketchConfig(name="count", size=20, keep_exact=[]))
    assert not can_separate(sketched.seen_by_generators(lenet_architecture), 2)
