import pytest
import torch
from closed_form import add
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import LeNetConfig, ResNetConfig, SketchConfig, ViTConfig
from gitlight.generators.averages import WeightedAverages
from gitlight.gradients.sketch import Sketch
from gitlight.leaked.model import LeakedModel

SHAPE = (3, 16, 16)


@pytest.mark.parametrize(
    ("activation", "inverse"), [("sigmoid", torch.logit), ("tanh", torch.atanh), ("relu", torch.clone)]
)
def test_the_last_layers_average_is_its_input_before_activations_that_squash(make_pairs, activation, inverse):
    leaked, pair = make_pairs(LeNetConfig(width=4, activation=activation, init="default"))
    averages = WeightedAverages(leaked.architecture)
    found = averages.split(averages.features(pair.gradients))["linear.weight"]
    body = nn.Sequential(*list(leaked.network.children())[:-1]).double()
    torch.testing.assert_close(found.double(), inverse(body(pair.images[:, 0].double())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("client_batch_size", [1, 3])
def test_an_average_is_the_least_squares_quotient_of_weight_and_bias_gradients(make_pairs, client_batch_size):
    leaked, pair = make_pairs(LeNetConfig(width=4, activation="relu"), client_batch_size=client_batch_size)
    averages = WeightedAverages(leaked.architecture)
    found = averages.split(averages.features(pair.gradients))
    assert list(found) == ["conv1.weight", "conv2.weight", "conv3.weight", "linear.weight"]
    for leak in range(len(pair.images)):
        for layer in ("conv2", "linear"):
            left = pair.gradients[f"{layer}.bias"][leak].unsqueeze(1)
            right = pair.gradients[f"{layer}.weight"][leak].flatten(1)
            wanted = torch.linalg.lstsq(left, right).solution[0]
            torch.testing.assert_close(found[f"{layer}.weight"][leak].double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_convolution_without_a_bias_takes_that_of_its_norm():
    architecture = LeakedModel(ResNetConfig(width=4), SHAPE, 5).architecture
    averages = WeightedAverages(architecture)
    convolutions = [layer.parameters["weight"] for layer in architecture.layers if layer.kind == "conv2d"]
    assert set(averages.split(torch.zeros(1, averages.n_entries))) == {*convolutions, "linear.weight"}


def test_sketched_weights_have_no_average():
    architecture = LeakedModel(LeNetConfig(width=4), SHAPE, 5).architecture
    sketch = Sketch(architecture, SketchConfig(name="count", size=64))
    averages = WeightedAverages(sketch.seen_by_generators(architecture))
    assert list(averages.split(torch.zeros(1, averages.n_entries))) == ["linear.weight"]


def test_a_weight_that_is_used_twice_has_no_average():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(12, 12), nn.Linear(12, 2)

        def forward(self, x):
            return self.last(torch.relu(self.inner(torch.relu(self.inner(x.flatten(1))))))

    averages = WeightedAverages(Architecture.of(Tied(), (3, 2, 2), 2))
    assert list(averages.split(torch.zeros(1, averages.n_entries))) == ["last.weight"]


def test_tiny_gradients_keep_their_averages_and_zero_ones_are_zero(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), dtype="float32")
    averages = WeightedAverages(leaked.architecture)
    wanted = averages.features(pair.gradients)
    torch.testing.assert_close(
        averages.features({name: 1e-25 * g for name, g in pair.gradients.items()}), wanted, rtol=1e-4, atol=1e-4
    )
    assert not averages.features({name: 0 * g for name, g in pair.gradients.items()}).any()


def test_averages_are_standardised_over_pairs(make_pairs):
    leaked, pair = make_pairs(ViTConfig(patch_size=4, hidden_size=12, depth=1, heads=2, mlp_size=16), n=40)
    averages = WeightedAverages(leaked.architecture)
    add(averages, pair)
    averages.finish()
    standardised = averages(pair.gradients)
    assert standardised.abs().max() <= 10
    inner = standardised[:, (standardised.abs() < 5).all(dim=0)]
    torch.testing.assert_close(inner.mean(dim=0), torch.zeros(inner.shape[1]), rtol=0, atol=1e-4)
