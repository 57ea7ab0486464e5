"""What is particular to Hybrid-GIT."""

from dataclasses import replace

import pytest
import torch
from closed_form import add, run_fits
from small_generators import DEEP, build
from torch import nn

from gitlight.architecture import IMAGE, Architecture
from gitlight.config import (
    ExactGeneratorConfig,
    FullyConnectedConfig,
    GaussianNoiseConfig,
    GradientsConfig,
    HybridGeneratorConfig,
    LeNetConfig,
    SketchConfig,
)
from gitlight.data.pair import GradientPair
from gitlight.errors import ArchitectureError, CheckpointError, ConfigError
from gitlight.generators import GENERATORS
from gitlight.generators.width import n_trainable
from gitlight.gradients.channel import GaussianNoise
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.sketch import Sketch


def test_hybrid_is_exact_for_fully_connected_networks_with_nothing_to_train(make_pairs):
    leaked, pair = make_pairs(FullyConnectedConfig(hidden_sizes=[12]))
    generator = run_fits(build("hybrid", leaked.architecture), [])
    assert n_trainable(generator) == 0
    torch.testing.assert_close(generator(pair.gradients), pair.images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("behind", [[], [nn.LogSoftmax(dim=1)], [nn.Dropout(0.5), nn.LogSoftmax(dim=-1)]])
def test_hybrid_is_exact_whatever_makes_no_difference_behind_the_logits(behind):
    torch.manual_seed(0)
    body = [nn.Flatten(), nn.Linear(48, 12), nn.Sigmoid(), nn.Linear(12, 5)]
    network = nn.Sequential(*body, *behind).eval().requires_grad_(False)
    architecture = Architecture.of(network, (3, 4, 4), 5)
    images, labels = torch.rand(6, 1, 3, 4, 4), torch.randint(5, (6, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype="float64"))(images, labels)
    generator = run_fits(build("hybrid", architecture), [])
    torch.testing.assert_close(generator(gradients), images, rtol=0, atol=1e-6)
    assert build("hybrid", architecture, 2).walk.n_slots == 2, "and tells images apart"


@pytest.fixture(scope="module")
def fully_solved():
    """A small convolutional model whose image forward equations reach, and 300 noisy pairs of it."""
    torch.manual_seed(4)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, 1, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(96, 6)
    ).requires_grad_(False)
    architecture = Architecture.of(network, (1, 8, 8), 6)
    images, labels = torch.rand(300, 1, 1, 8, 8), torch.randint(6, (300, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype="float64"))(images, labels)
    return architecture, gradients, images


def test_hybrid_with_forward_equations_starts_from_exact_inversion(fully_solved):
    architecture, gradients, images = fully_solved
    pair = GradientPair(gradients, images, torch.zeros(300, 1), torch.arange(300).view(300, 1))
    generator = run_fits(build("hybrid", architecture, forward_equations=True), [pair])
    assert generator.walk.features[-1].result == IMAGE
    assert generator.ridge.error < 1e-4
    some = {name: gradient[:4] for name, gradient in gradients.items()}
    torch.testing.assert_close(generator.start(some), images[:4], rtol=0, atol=1e-3)
    assert any(parameter.requires_grad for parameter in generator.parameters()), "what noise leaves is learned"


def test_hybrid_takes_weights_that_clean_pairs_gave(fully_solved, tmp_path):
    architecture, gradients, images = fully_solved
    torch.manual_seed(0)
    exact = GENERATORS["exact"].load()(architecture, ExactGeneratorConfig(), 1)
    pair = GradientPair(gradients, images, torch.zeros(300, 1), torch.arange(300).view(300, 1))
    run_fits(exact, [pair])
    file = tmp_path / "exact.ckpt"
    torch.save({"state_dict": {f"generator.{key}": value for key, value in exact.state_dict().items()}}, file)
    noisy = GaussianNoise(GaussianNoiseConfig(relative_std=1e-4))(gradients, torch.arange(300))
    noisy_pair = replace(pair, gradients=noisy)
    own = run_fits(build("hybrid", architecture, forward_equations=True), [noisy_pair])
    taken = run_fits(build("hybrid", architecture, forward_equations=True, weights_from=str(file)), [noisy_pair])
    assert taken.ridge.error < 0.3 * own.ridge.error, "noisy pairs fit no weights"
    name = next(iter(taken.estimated_parameters()))
    assert torch.equal(taken.estimated_parameters()[name].value, exact.estimated_parameters()[name].value)
    given = {"forward_equations": True, "weights_from": str(file), "exact_depth": 1}
    cut = run_fits(build("hybrid", architecture, **given), [noisy_pair])
    assert list(cut.estimated_parameters()) == list(architecture.parameter_shapes)[-2:]


def test_hybrid_names_what_it_cannot_take_weights_from(fully_solved, lenet_architecture, tmp_path):
    architecture, _, _ = fully_solved
    given = {"forward_equations": True, "weights_from": str(tmp_path / "none")}
    with pytest.raises(CheckpointError, match=r"generator\.weights_from: .*none does not exist"):
        list(build("hybrid", architecture, **given).fits())
    torch.manual_seed(0)
    other = GENERATORS["exact"].load()(lenet_architecture, ExactGeneratorConfig(), 1)
    for state, message in (({}, "holds no weights"), (other.state_dict(), "is of another leaked model")):
        file = tmp_path / "other.ckpt"
        torch.save({"state_dict": {f"generator.{key}": value for key, value in state.items()}}, file)
        with pytest.raises(CheckpointError, match=rf"generator\.weights_from: .*{message}"):
            list(build("hybrid", architecture, **{**given, "weights_from": str(file)}).fits())
    with pytest.raises(ConfigError, match=r"generator\.weights_from: .*forward_equations=true"):
        build("hybrid", architecture, weights_from="run")


def test_hybrid_takes_forward_equations_of_one_image_per_leak_only(lenet_architecture):
    with pytest.raises(ConfigError, match=r"generator\.forward_equations: .*client_batch_size above 1"):
        build("hybrid", lenet_architecture, client_batch_size=2, forward_equations=True)


def test_hybrid_sees_how_noisy_a_leak_is(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=60, dtype="float32")
    generator = run_fits(build("hybrid", leaked.architecture), [pair])
    clean = generator.walk(pair.gradients).levels
    channel = GaussianNoise(GaussianNoiseConfig(relative_std=1e-3))
    noisy = generator.walk(channel(pair.gradients, torch.arange(len(pair)))).levels
    torch.testing.assert_close(noisy[:, 0], torch.full_like(noisy[:, 0], -3.0), rtol=0, atol=0.15)
    assert (clean[:, 0] < -5.5).all()
    assert (noisy[:, 1] > clean[:, 1] + 1).all(), "the first feature's error grows with it"


def test_hybrid_starts_from_its_closed_form(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=12), n=400)
    generator = run_fits(build("hybrid", leaked.architecture), [pair])
    assert torch.equal(generator(pair.gradients), generator.start(pair.gradients))
    error = (generator(pair.gradients) - pair.images).square().mean()
    spread = (pair.images.mean(dim=0) - pair.images).square().mean()
    assert error < 0.01 * spread, "the closed form alone must be far better than the mean image"


def test_averages_of_inverted_layers_are_used_where_asked(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4))
    n_averages = {}
    for asked in (False, True):
        generator = run_fits(build("hybrid", leaked.architecture, averages_of_inverted_layers=asked), [pair])
        n_averages[asked] = generator.averages.n_entries
        assert torch.isfinite(generator(pair.gradients)).all()
    # All layers of so small a model are inverted. Patches of three convolutions, and the last layer's input.
    assert n_averages == {False: 0, True: 3 * 25 + 2 * 4 * 25 + 4 * 4 * 4}


def test_hybrids_start_uses_the_averages_of_deeper_layers():
    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    # A convolution with one position: its average is the image. There is no rule for a sine, and no walk passes it.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 6), Sine(), nn.Flatten(), nn.Linear(8, 5)).double()
    architecture = Architecture.of(network, (3, 6, 6), 5)
    images, labels = torch.rand(400, 1, 3, 6, 6), torch.randint(5, (400, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype="float64"))(images, labels)
    pair = GradientPair(gradients, images, labels, torch.arange(400).unsqueeze(1))
    errors = {}
    for averages in (True, False):
        generator = run_fits(build("hybrid", architecture, averages=averages), [pair])
        errors[averages] = (generator.start(gradients) - images).square().mean()
    assert errors[True] < 1e-6
    assert errors[False] > 1e-2


def test_hybrid_holds_the_same_share_of_pairs_out_for_any_client_batch(make_pairs):
    for client_batch_size in (1, 5, 10):
        leaked, pair = make_pairs(LeNetConfig(width=4), n=40, client_batch_size=client_batch_size)
        (*_, fit) = build("hybrid", leaked.architecture, client_batch_size).fits()
        add(fit, pair)
        kept, held_out = fit.sums()[:2]
        assert (kept[0, 0], held_out[0, 0]) == (36, 4), "the count is the product of ones"


def test_hybrid_learns_from_pixels_that_overshoot(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=4), n=60)
    generator = run_fits(build("hybrid", leaked.architecture), [pair])
    with torch.no_grad():
        generator.refinement.leave.bias.fill_(5.0)
    images = generator(pair.gradients)
    assert (images == 1).all()
    (images - pair.images).square().mean().backward()
    assert (generator.refinement.leave.bias.grad > 0).all()


def test_hybrid_uses_the_gradients_of_layers_that_its_walk_does_not_reach(make_pairs):
    leaked, _ = make_pairs(LeNetConfig(width=12), shape=(3, 32, 32))
    generator = build("hybrid", leaked.architecture)
    assert generator.scaling.n_entries == sum(p.numel() for p in leaked.network.conv1.parameters())


def test_hybrid_learns_from_the_smallest_gradients_that_fit(make_pairs):
    leaked, _ = make_pairs(DEEP[0])
    shapes = leaked.architecture.parameter_shapes
    generator = build("hybrid", leaked.architecture, gradient_entries=2000)
    assert 1500 < generator.scaling.n_entries <= 2000
    left_out = sum(shape.numel() for shape in shapes.values()) - generator.scaling.n_entries
    assert left_out > 2000
    assert build("hybrid", leaked.architecture, gradient_entries=0).scaling is None


def test_hybrid_names_the_sketch_that_hides_its_start(lenet_architecture):
    sketch = Sketch(lenet_architecture, SketchConfig(name="count", size=50, keep_exact=["*.bias"]))
    with pytest.raises(ArchitectureError, match=r"of linear.weight there is only a sketch.*keep_exact"):
        build("hybrid", sketch.seen_by_generators(lenet_architecture))


@pytest.mark.parametrize("size", [(3, 15, 17), (1, 9, 9)])
def test_hybrid_takes_images_of_odd_size(size):
    network = nn.Sequential(nn.Conv2d(size[0], 6, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(1, *size))
    architecture = Architecture.of(network, size, 3)
    generator = GENERATORS["hybrid"].load()(architecture, HybridGeneratorConfig(channels=4, blocks=1))
    gradients = {name: torch.randn(2, *p.shape) for name, p in network.named_parameters()}
    assert generator(gradients).shape == (2, 1, *size)


def test_a_budget_holds_whatever_channels_the_settings_name():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.GELU(), nn.Conv2d(4, 4, 3, 2, 1), nn.GELU(), nn.Flatten())
    architecture = Architecture.of(network.append(nn.Linear(36, 3)), (3, 12, 12), 3)
    for channels in (4, 64):
        n_parameters = n_trainable(build("hybrid", architecture, parameters=5000, channels=channels))
        assert 3000 < n_parameters <= 5000


@pytest.mark.parametrize("make", [nn.Sigmoid, nn.GELU])
def test_the_smallest_linear_start_that_is_named_works(make):
    network = nn.Sequential(nn.Conv2d(3, 6, 5, 2, 1), make(), nn.Conv2d(6, 4, 3, 2, 1), make(), nn.Flatten())
    architecture = Architecture.of(network.append(nn.Linear(36, 3)), (3, 12, 12), 3)
    with pytest.raises(ConfigError, match=r"generator\.linear_start_features: 1 is less than .* at least") as raised:
        build("hybrid", architecture, linear_start_features=1)
    least = int(str(raised.value).rstrip(".").split()[-1])
    build("hybrid", architecture, linear_start_features=least)
    with pytest.raises(ConfigError, match=f"at least {least}"):
        build("hybrid", architecture, linear_start_features=least - 1)


class Pooled(nn.Module):
    """Its last layer takes a vector, as the mean over positions is."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 20, 3), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_of_a_single_feature_the_smallest_linear_start_is_named():
    architecture = Architecture.of(Pooled(), (3, 12, 12), 3)
    with pytest.raises(ConfigError, match=r"generator\.linear_start_features: 10 is less than .* at least 20\."):
        build("hybrid", architecture, linear_start_features=10)


def test_hybrid_calls_nothing_exact_of_an_update(lenet_architecture):
    generator = build("hybrid", lenet_architecture)
    assert "input of linear (exact)" in generator.describe()
    told = generator.describe("update(epochs=2, batch_size=1, learning_rate=0.1)")
    assert (
        "as if update(epochs=2, batch_size=1, learning_rate=0.1) were one gradient: input of linear (estimate)" in told
    )
    assert "(exact)" not in told
