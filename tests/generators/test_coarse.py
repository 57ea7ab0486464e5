"""What is particular to Coarse-GIT."""

import torch
from closed_form import run_fits
from small_generators import DEEP, build
from tied import Tied
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import (
    CoarseGeneratorConfig,
    LeNetConfig,
)
from gitlight.generators import GENERATORS, coarse


def test_coarse_has_one_step_per_module_with_the_shapes_of_the_trace(lenet_architecture):
    generator = GENERATORS["coarse"].load()(lenet_architecture, CoarseGeneratorConfig(hidden_size=7, averages=False))
    shapes = [(step.hidden.in_features, step.output.out_features) for step in generator.steps]
    linear, conv, first = 64 * 5 + 5, 4 * 4 * 25 + 4, 4 * 3 * 25 + 4
    assert shapes == [(linear, 64), (64 + conv, 64), (64 + conv, 256), (256 + first, 768)]


def test_a_coarse_step_sees_the_averages_of_its_own_layers(lenet_architecture):
    with_them, without = (
        GENERATORS["coarse"].load()(lenet_architecture, CoarseGeneratorConfig(hidden_size=7, averages=averages))
        for averages in (True, False)
    )
    more = [a.hidden.in_features - b.hidden.in_features for a, b in zip(with_them.steps, without.steps, strict=True)]
    assert more == [64, 4 * 25, 4 * 25, 3 * 25]


def test_coarse_corrects_a_regression_on_the_averages_of_the_smallest_layers(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=300)
    generator = run_fits(build("coarse", leaked.architecture, linear_start_features=250), [pair])
    for parameter in generator.steps[-1].parameters():
        nn.init.zeros_(parameter)

    averages = generator.averages.split(generator.averages.features(pair.gradients))
    smallest = ("conv1.weight", "conv2.weight", "linear.weight")  # 75, 100 and 64 entries; conv3's 100 are too many
    features = torch.cat([averages[name] for name in smallest], dim=1).double()
    centred = (features - features.mean(dim=0)) / features.std(dim=0, correction=0)
    images = pair.images.flatten(1).double()
    # The same regression from the pairs themselves, by singular values.
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    shrunk = values / (values.square() + len(images) * generator.ridge.strength)
    wanted = images.mean(dim=0) + centred @ right.T @ (shrunk.unsqueeze(1) * left.T @ images)
    found = generator(pair.gradients).flatten(1).double()
    torch.testing.assert_close(found, wanted.clamp(0, 1), rtol=0, atol=1e-3)


def test_coarse_without_a_linear_start_makes_the_image_by_its_steps_alone(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=60)
    generator = run_fits(build("coarse", leaked.architecture, linear_start_features=0), [pair])
    assert generator.ridge is None
    for parameter in generator.steps[-1].parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(generator(pair.gradients), torch.full_like(pair.images, 0.5, dtype=torch.float32))


def test_large_estimates_of_coarse_are_made_by_convolutions(make_pairs, monkeypatch):
    monkeypatch.setattr(coarse, "_MOST_ENTRIES", 600)
    leaked, _ = make_pairs(DEEP[0])
    generator = build("coarse", leaked.architecture)
    # The image, 768 entries, and the four estimates of 4 × 16 × 16.
    assert [step.convolutions is not None for step in generator.steps] == [False] * 6 + [True] * 5


def test_coarse_takes_a_module_whose_parameters_are_an_earlier_ones():
    network = Tied()
    generator = build("coarse", Architecture.of(network, (3, 2, 2), 2))
    gradients = {name: torch.randn(4, *p.shape) for name, p in network.named_parameters()}
    assert generator(gradients).shape == (4, 1, 3, 2, 2)


def test_coarse_of_one_module_is_a_multilayer_perceptron(lenet_architecture):
    generator = build("coarse", lenet_architecture, modules=["*"])
    assert len(generator.steps) == 1
