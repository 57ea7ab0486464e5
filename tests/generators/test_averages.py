import pytest
import torch
from closed_form import add
from tied import Tied
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, LeNetConfig, ResNetConfig, SketchConfig, ViTConfig
from gitlight.generators.averages import WeightedAverages
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.sketch import Sketch
from gitlight.leaked.model import LeakedModel

SHAPE = (3, 16, 16)


@pytest.mark.parametrize(
    ("activation", "inverse"), [("sigmoid", torch.logit), ("tanh", torch.atanh), ("relu", torch.clone)]
)
def test_the_last_layers_average_is_its_input_before_activations_that_squash(make_pairs, activation, inverse):
    leaked, pair = make_pairs(LeNetConfig(width=4, activation=activation, init="default"))
    averages = WeightedAverages(leaked.architecture, 1)
    found = averages.split(averages.features(pair.gradients))["linear.weight"]
    body = nn.Sequential(*list(leaked.network.children())[:-1]).double()
    torch.testing.assert_close(found.double(), inverse(body(pair.images[:, 0].double())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("client_batch_size", "activation"), [(1, "relu"), (3, "relu"), (3, "sigmoid")])
def test_an_average_is_the_least_squares_quotient_of_weight_and_bias_gradients(
    make_pairs, client_batch_size, activation
):
    leaked, pair = make_pairs(LeNetConfig(width=4, activation=activation), client_batch_size=client_batch_size)
    averages = WeightedAverages(leaked.architecture, client_batch_size)
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
    averages = WeightedAverages(architecture, 1)
    convolutions = [layer.parameters["weight"] for layer in architecture.layers if layer.kind == "conv2d"]
    assert set(averages.split(torch.zeros(1, averages.n_entries))) == {*convolutions, "linear.weight"}


def test_an_average_behind_a_norm_is_one_of_patches_up_to_a_factor_for_each_channel():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    for tensor in (norm.weight, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    network = nn.Sequential(conv, norm, nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 5)).double().eval()
    architecture = Architecture.of(network, (3, 6, 6), 5)
    images, labels = torch.rand(3, 1, 3, 6, 6, dtype=torch.float64), torch.tensor([[0], [1], [2]])
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype="float64"))(images, labels)
    averages = WeightedAverages(architecture, 1)
    found = averages.split(averages.features(gradients))["0.weight"].double()
    for leak in range(3):
        outputs = norm(conv(images[leak])).detach().requires_grad_()
        loss = nn.functional.cross_entropy(network[2:](outputs), labels[leak])
        delta = torch.autograd.grad(loss, outputs)[0].flatten(2)[0]
        patches = nn.functional.unfold(images[leak], 3)[0]
        factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        sums = delta.sum(dim=1)
        per_channel = factor.unsqueeze(1) * (delta @ patches.T) / sums.unsqueeze(1)
        wanted = (sums.square().unsqueeze(1) * per_channel).sum(dim=0) / sums.square().sum()
        torch.testing.assert_close(found[leak], wanted, rtol=1e-5, atol=1e-6)


def test_a_convolution_before_a_norm_by_batch_statistics_has_no_average():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(64, 5)
    )
    averages = WeightedAverages(Architecture.of(network, (3, 6, 6), 5), 1)
    assert list(averages.split(torch.zeros(1, averages.n_entries))) == ["3.weight"]


def test_a_bias_whose_gradient_is_rounding_gives_no_average_and_spoils_no_other():
    class KeysWithBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.last = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 5)

        def forward(self, x):
            tokens = x.flatten(2)
            weights = (self.query(tokens) @ self.key(tokens).transpose(1, 2)).softmax(dim=2)
            return self.last((weights @ tokens).mean(dim=1))

    torch.manual_seed(0)
    network = KeysWithBias()
    architecture = Architecture.of(network, (3, 2, 3), 5)
    images, labels = torch.rand(50, 1, 3, 2, 3), torch.randint(5, (50, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig())(images, labels)
    averages = WeightedAverages(architecture, 1)
    assert not averages.split(averages.features(gradients))["key.weight"].any()
    averages.update(gradients, images, labels)
    averages.finish()
    standardised = averages.split(averages(gradients))
    assert standardised["last.weight"].std(dim=0).min() > 0.5


def test_a_limit_keeps_the_averages_of_the_smallest_layers():
    architecture = LeakedModel(LeNetConfig(width=4), SHAPE, 5).architecture
    averages = WeightedAverages(architecture, 1, limit=250)
    assert list(averages.split(torch.zeros(1, averages.n_entries))) == ["conv1.weight", "conv2.weight", "linear.weight"]
    assert averages.n_layers == 3


def test_sketched_weights_have_no_average():
    architecture = LeakedModel(LeNetConfig(width=4), SHAPE, 5).architecture
    sketch = Sketch(architecture, SketchConfig(name="count", size=64))
    averages = WeightedAverages(sketch.seen_by_generators(architecture), 1)
    assert list(averages.split(torch.zeros(1, averages.n_entries))) == ["linear.weight"]


def test_a_weight_that_is_used_twice_has_no_average():
    averages = WeightedAverages(Architecture.of(Tied(), (3, 2, 2), 2), 1)
    assert list(averages.split(torch.zeros(1, averages.n_entries))) == ["last.weight"]


class Hyper(nn.Module):
    """Makes a convolution's weight of a parameter, by a linear layer."""

    def __init__(self):
        super().__init__()
        self.code, self.make = nn.Parameter(torch.rand(5)), nn.Linear(5, 54)
        self.head = nn.Linear(2 * 14 * 14, 10)

    def forward(self, images):
        made = nn.functional.conv2d(images, self.make(self.code).view(2, 3, 3, 3))
        return self.head(made.tanh().flatten(1))


def test_a_layer_that_sees_no_image_has_no_average():
    architecture = Architecture.of(Hyper(), SHAPE, 10)
    assert [pair.weight for pair in WeightedAverages(architecture, 1)._pairs] == ["head.weight"]


def test_tiny_gradients_keep_their_averages_and_zero_ones_are_zero(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), dtype="float32")
    averages = WeightedAverages(leaked.architecture, 1)
    wanted = averages.features(pair.gradients)
    torch.testing.assert_close(
        averages.features({name: 1e-25 * g for name, g in pair.gradients.items()}), wanted, rtol=1e-4, atol=1e-4
    )
    assert not averages.features({name: 0 * g for name, g in pair.gradients.items()}).any()


def test_averages_are_standardised_over_pairs(make_pairs):
    leaked, pair = make_pairs(ViTConfig(patch_size=4, hidden_size=12, depth=1, heads=2, mlp_size=16), n=40)
    averages = WeightedAverages(leaked.architecture, 1)
    add(averages, pair)
    averages.finish()
    standardised = averages(pair.gradients)
    usual = standardised[:, (standardised.abs() < 9).all(dim=0)]
    assert usual.shape[1] > 0.9 * averages.n_entries
    torch.testing.assert_close(usual.mean(dim=0), torch.zeros(usual.shape[1]), rtol=0, atol=1e-4)
    assert (usual.std(dim=0) - 1).abs().max() < 0.05


def test_averages_have_full_precision_whatever_that_of_trained_layers(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4))
    averages = WeightedAverages(leaked.architecture, 1)
    wanted = averages.features(pair.gradients)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(averages.features(pair.gradients), wanted)
