"""What a learned generator gets of each image of a client batch, and what hybrid makes of it."""

import pytest
import torch
from closed_form import run_fits
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import HybridGeneratorConfig, LeNetConfig, ResNetConfig, SketchConfig
from gitlight.errors import ConfigError, DataError
from gitlight.generators.base import FitOn
from gitlight.generators.exact.features import LEVELS
from gitlight.generators.exact.labels import labels_of_batch
from gitlight.generators.exact.separated import SeparatedFeatures, can_separate
from gitlight.generators.hybrid import HybridGenerator
from gitlight.gradients.sketch import Sketch
from gitlight.leaked.model import LeakedModel
from gitlight.metrics import match


def make_hybrid(make_pairs, n_leaks, n_single, **changed):
    """A small fitted `hybrid` for client batches of two, and the pairs that it was fitted on."""
    settings = LeNetConfig(width=4)
    leaked, pair = make_pairs(settings, n=n_leaks, client_batch_size=2)
    _, single = make_pairs(settings, n=n_single)
    chosen = HybridGeneratorConfig(channels=8, blocks=1, gradient_channels=2, **changed)
    torch.manual_seed(0)
    return run_fits(HybridGenerator(leaked.architecture, chosen, 2), [pair], [single]), pair


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
    found, levels, _ = features(pair.gradients)
    assert features.features[0].result == "conv3"
    values = found[0].view(30, 2, -1)
    wanted = truth.view(30, 2, 1, 16, 4).movedim(2, 3)  # as images of 16 × 4, to be matched
    matched = match(values.view(30, 2, 1, 16, 4).float(), wanted.reshape(30, 2, 1, 16, 4).float())
    errors = (matched - wanted.reshape(matched.shape)).abs().flatten(1).max(dim=1).values
    assert (errors < 1e-3).double().mean() > 0.9
    assert levels.shape == (60, 1 + len(features.features))


def test_the_last_layers_weights_are_found_up_to_a_common_row(separated):
    features, leaked, _ = separated
    found = features.estimated_parameters()["linear.weight"]
    assert found.up_to_common_row
    true = leaked.network[-1].weight.double()
    torch.testing.assert_close(found.value, true - true.mean(dim=0), rtol=1e-5, atol=1e-6)


def test_leaks_that_are_zero_or_not_finite_are_no_estimate_and_spoil_no_other(separated):
    features, _, pair = separated
    clean = features(pair.gradients).values
    spoiled = {name: gradient.clone() for name, gradient in pair.gradients.items()}
    for gradient in spoiled.values():
        gradient[3] = 0
    spoiled["conv1.bias"][5, 0] = float("nan")
    found, levels, _ = features(spoiled)
    bad = torch.tensor([6, 7, 10, 11])
    assert not found[0][bad].any()
    assert (levels[bad] == LEVELS[1]).all()
    rest = torch.ones(60, dtype=torch.bool).index_fill(0, bad, False)
    torch.testing.assert_close(found[0][rest], clean[0][rest], rtol=1e-4, atol=1e-4)


def test_a_batch_without_a_usable_leak_is_no_error(separated):
    features, _, pair = separated
    found, levels, _ = features({name: torch.zeros_like(gradient) for name, gradient in pair.gradients.items()})
    assert not found[0].any()
    assert (levels == LEVELS[1]).all()


def test_single_images_without_an_output_error_spoil_no_fit(make_pairs):
    settings = LeNetConfig(width=4)
    leaked, single = make_pairs(settings, n=400)
    clean, spoiled = (SeparatedFeatures(leaked.architecture, None, 2) for _ in range(2))
    for features, first, gradients in (
        (clean, 1, {name: gradient[1:] for name, gradient in single.gradients.items()}),
        (
            spoiled,
            0,
            single.gradients | {"linear.bias": single.gradients["linear.bias"].index_fill(0, torch.tensor([0]), 0)},
        ),
    ):
        for fit in features.fits():
            fit.update(gradients, single.images[first:], single.indices[first:, 0])
            fit.finish()
    for name, wanted in clean.state_dict().items():
        torch.testing.assert_close(spoiled.state_dict()[name], wanted, msg=name)

    fit = next(iter(SeparatedFeatures(leaked.architecture, None, 2).fits()))
    without = {name: torch.zeros_like(g) if name == "linear.bias" else g for name, g in single.gradients.items()}
    fit.update(without, single.images, single.indices[:, 0])
    with pytest.raises(DataError, match=r"generator\.separate=false"):
        fit.finish()


def test_hybrid_gives_the_labels_that_it_reads_off(make_pairs):
    generator, pair = make_hybrid(make_pairs, 60, 400)
    assert torch.equal(generator.reconstruct(pair.gradients).labels, pair.labels.sort(dim=1).values)
    walk, right = generator.walk, pair.labels.sort(dim=1).values
    walk.probabilities.copy_(torch.softmax(torch.randn(5, generator=torch.Generator().manual_seed(2)), dim=0))
    misread = (labels_of_batch(pair.gradients["linear.bias"].double(), walk.probabilities, 2) != right).any(dim=1)
    mended = (generator.reconstruct(pair.gradients).labels == right).all(dim=1)
    assert misread.sum() >= 10
    assert mended.double().mean() > 0.9
    other, _ = make_hybrid(make_pairs, 60, 400, separate=False)
    assert other.reconstruct(pair.gradients).labels is None


def test_what_is_the_whole_leaks_goes_to_each_of_its_own_images(make_pairs):
    generator, pair = make_hybrid(make_pairs, 60, 400)
    nn.init.normal_(generator.refinement.leave.weight, std=0.1)
    # Without noise the levels, logarithms of what equations leave over, are of rounding.
    gradients = {name: g + 1e-8 * g.std() * torch.randn_like(g) for name, g in pair.gradients.items()}
    whole = generator(gradients)
    for number in (0, 1, 7):
        alone = generator({name: gradient[number : number + 1] for name, gradient in gradients.items()})
        torch.testing.assert_close(alone[0], whole[number], rtol=1e-4, atol=1e-4)


def test_the_second_regression_is_of_single_images(make_pairs):
    settings = LeNetConfig(width=4)
    leaked, pair = make_pairs(settings, n=300, client_batch_size=2)
    _, single = make_pairs(settings, n=600)
    chosen = HybridGeneratorConfig(channels=8, blocks=1, gradient_channels=2)
    generator = HybridGenerator(leaked.architecture, chosen, 2)
    errors, names = [], []
    for fit in generator.fits():
        names.append(fit.name)
        (used,) = [single] if (isinstance(fit, FitOn) and fit.pairs.single_images) else [pair]
        fit.update(used.gradients, used.images, used.indices[:, 0] // used.images.shape[1])
        fit.finish()
        errors.append((match(generator.start(pair.gradients), pair.images) - pair.images).square().mean())
    assert names[-2:] == ["FeatureFit", "MatchedFit"]
    assert errors[-1] < errors[-2]


def test_training_lowers_the_error_of_separated_images(make_pairs):
    generator, _ = make_hybrid(make_pairs, 150, 400)
    _, other = make_pairs(LeNetConfig(width=4), n=150, client_batch_size=2, seed=1)
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
    _, other = make_pairs(LeNetConfig(width=4), n=40, client_batch_size=2, seed=1)
    errors = {}
    for separate_images in (None, False):
        generator, _ = make_hybrid(make_pairs, 400, 800, separate=separate_images)
        start = generator.start(other.gradients)
        assert start.shape == other.images.shape
        errors[separate_images] = (match(start, other.images) - other.images).square().mean()
    assert errors[None] < 0.75 * errors[False]


def test_what_cannot_be_separated_is_an_error_where_it_is_asked_for(lenet_architecture):
    assert can_separate(lenet_architecture, 4)
    assert not can_separate(lenet_architecture, 5)  # five classes
    for separate_images, n_slots in ((None, 4), (True, 4), (False, 1)):
        settings = HybridGeneratorConfig(separate=separate_images)
        assert HybridGenerator(lenet_architecture, settings, 4).walk.n_slots == n_slots
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


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_partly_frozen_last_layer_is_not_separable(frozen):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    assert can_separate(Architecture.of(network, (3, 2, 2), 10), 2)
    getattr(network[1], frozen).requires_grad_(False)
    assert not can_separate(Architecture.of(network, (3, 2, 2), 10), 2)


def test_every_layers_input_is_each_images_own(separated):
    features, leaked, pair = separated
    assert [feature.result for feature in features.features] == ["conv3", "conv2", "activation1"]
    assert [feature.exact for feature in features.features] == [True, True, False]
    network = leaked.network.double()
    images = pair.images.flatten(0, 1).double()
    truths = [network[:5](images), network[:3](images), network[:2](images)]
    values, levels, _ = features(pair.gradients)
    order = torch.cdist(truths[0].view(30, 2, -1), values[0].view(30, 2, -1)).argmin(dim=2)
    for number, (truth, value, relative) in enumerate(zip(truths, values, (1e-3, 0.1, 0.3), strict=True)):
        matched = value.view(30, 2, -1).gather(1, order.unsqueeze(2).expand(-1, -1, value[0].numel()))
        errors = (matched - truth.view(30, 2, -1)).square().mean(dim=2).sqrt()
        assert (errors < relative * truth.std()).double().mean() > 0.9, number
        stated = 10 ** levels[:, 1 + number].view(30, 2).gather(1, order)
        assert (errors < 30 * stated + 1e-9).double().mean() > 0.9, number


def test_a_last_layer_whose_weight_is_used_twice_tells_nothing_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 12)

        def forward(self, images):
            return self.head(torch.tanh(self.head(images.flatten(1))))

    assert not can_separate(Architecture.of(Twice(), (3, 2, 2), 12), 2)


def test_a_fit_finds_with_part_of_a_plan_what_the_whole_plan_finds(separated):
    features, _, pair = separated
    inversion = features.inversion
    gradients = {name: gradient[:10] for name, gradient in pair.gradients.items()}
    everything = inversion.find(inversion.usable(gradients))
    action = inversion.current_plan().solves[1]
    below, name = action.layer.inputs[0], action.layer.name
    plan = inversion.current_plan().up_to([below], [name])
    leaks = inversion.usable(gradients, plan)
    assert set(leaks.gradients) < set(inversion.usable(gradients).gradients)
    found = inversion.find(leaks, plan)
    assert set(found.values) < set(everything.values)
    assert torch.equal(found.values[below].value, everything.values[below].value)
    assert torch.equal(found.values[below].variance, everything.values[below].variance)
    assert torch.equal(found.deltas[name], everything.deltas[name])
