"""Hybrid-GIT on leaked models whose last layer has no bias."""

import pytest
import torch
from closed_form import run_fits
from small_generators import build
from smooth import smooth_images
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.data.pair import GradientPair
from gitlight.errors import ArchitectureError
from gitlight.gradients.engine import GradientEngine

SHAPE, N_CLASSES, N_PAIRS = (3, 8, 8), 6, 500


def leaks_of(dtype):
    """A small convolutional model without a last bias, and pairs of it."""
    torch.manual_seed(4)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, 1, 1), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(96, N_CLASSES, bias=False),
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    network.requires_grad_(False)
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    images = smooth_images(N_PAIRS, 0, SHAPE).unsqueeze(1)
    labels = torch.randint(N_CLASSES, (N_PAIRS, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype=dtype))(images, labels)
    return network, architecture, GradientPair(gradients, images, labels, torch.arange(N_PAIRS).view(N_PAIRS, 1))


def some(pair, which):
    gradients = {name: gradient[which] for name, gradient in pair.gradients.items()}
    return GradientPair(gradients, pair.images[which], pair.labels[which], pair.indices[which])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-3)])
def test_inputs_are_found_with_their_scale(dtype, tolerance):
    network, architecture, pair = leaks_of(dtype)
    generator = run_fits(build("hybrid", architecture), [some(pair, slice(0, 400))])
    private = some(pair, slice(400, None))
    found = generator.walk(private.gradients)
    assert [(feature.result, feature.exact) for feature in generator.walk.features[:2]] == [("2", True), ("0", True)]
    images = private.images[:, 0].double()
    double = network.double()
    torch.testing.assert_close(found.values[0], double[:3](images), rtol=0, atol=tolerance)
    torch.testing.assert_close(found.values[1], double[:1](images), rtol=0, atol=10 * tolerance)
    weight = generator.estimated_parameters()["5.weight"].value
    truth = double[5].weight - double[5].weight.mean(dim=0)
    assert (weight - truth).norm() < 1e2 * tolerance * truth.norm()


def test_a_tiny_hybrid_learns_and_beats_the_mean_image():
    _, architecture, pair = leaks_of("float32")
    public, private = some(pair, slice(0, 400)), some(pair, slice(400, None))
    generator = run_fits(build("hybrid", architecture), [public])

    def error(images):
        return (images - private.images).square().mean().item()

    with torch.no_grad():
        before = error(generator(private.gradients))
    optimizer = torch.optim.Adam((p for p in generator.parameters() if p.requires_grad), 1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((generator(public.gradients) - public.images).square().mean())
        losses[-1].backward()
        optimizer.step()
    with torch.no_grad():
        after = error(generator(private.gradients))
    assert losses[-1] < losses[0]
    assert max(before, after) < 0.1 * error(public.images.mean(dim=0)), "0.0025 of it is white noise in the images"


def test_of_fewer_pairs_than_features_inputs_keep_the_scale_that_is_guessed():
    network, architecture, pair = leaks_of("float64")
    generator = run_fits(build("hybrid", architecture, exact_depth=1), [some(pair, slice(0, 80))])
    private = some(pair, slice(400, None))
    found = generator.walk(private.gradients).values[0]
    truth = network.double()[:4](private.images[:, 0].double()).view_as(found)
    probabilities = torch.softmax(network(private.images[:, 0].double()), dim=1)
    share = 1 - probabilities.gather(1, private.labels).view(-1, *[1] * (found.dim() - 1))
    torch.testing.assert_close(found, torch.logit(truth * share), rtol=1e-8, atol=1e-8)


def test_the_last_layers_weight_is_fitted_for_its_input_alone():
    _, architecture, pair = leaks_of("float64")
    generator = run_fits(build("hybrid", architecture, exact_depth=1), [pair])
    assert list(generator.estimated_parameters()) == ["5.weight"]
    assert len(generator.walk.features) == 1


def test_client_batches_are_refused_with_one_message():
    _, architecture, _ = leaks_of("float64")
    with pytest.raises(ArchitectureError, match=r"parameters: 5\.weight.*Without a bias it takes single images"):
        build("hybrid", architecture, client_batch_size=2)


@pytest.mark.parametrize(("depth", "advised"), [(None, True), (1, False)])
def test_too_few_pairs_are_a_warning_that_says_what_else_helps(depth, advised, caplog):
    _, architecture, pair = leaks_of("float64")
    run_fits(build("hybrid", architecture, exact_depth=depth), [some(pair, slice(0, 60))])
    (message, *_) = [record.getMessage() for record in caplog.records if "last layer's weight" in record.getMessage()]
    assert " equations for 96 unknowns; " in message
    assert ("generator.exact_depth=1" in message) == advised
