import pytest
import torch
from closed_form import add, run_fits
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import (
    ExactGeneratorConfig,
    FullyConnectedConfig,
    GradientsConfig,
    LeNetConfig,
    ResNetConfig,
    ViTConfig,
)
from gitlight.data.pair import GradientPair
from gitlight.errors import CheckpointError, ConfigError
from gitlight.generators.exact.generator import ExactGenerator
from gitlight.generators.exact.status import Status
from gitlight.gradients.engine import GradientEngine

DETERMINED = Status.EXACT.words


@pytest.fixture
def exact(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=6), n=300)
    return run_fits(ExactGenerator(leaked.architecture, ExactGeneratorConfig()), [pair]), pair


def test_images_and_verdicts(exact):
    generator, pair = exact
    gradients = {name: gradient[:4] for name, gradient in pair.gradients.items()}
    images, verdicts, _ = generator.reconstruct(gradients)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, pair.images[:4].float(), rtol=0, atol=1e-5)
    assert verdicts == (DETERMINED,) * 4


def test_leaks_that_cannot_be_inverted_are_named_and_alone(exact):
    generator, pair = exact
    gradients = {name: gradient[:6].clone() for name, gradient in pair.gradients.items()}
    for gradient in gradients.values():
        gradient[0] = 0
        gradient[1] = float("nan")
        gradient[2] = (gradient[3] + gradient[4]) / 2
    gradients["conv2.weight"][5, 0, 0, 0, 0] = float("inf")
    images, verdicts, _ = generator.reconstruct(gradients)
    words = [
        Status.ZERO_GRADIENT,
        Status.NOT_FINITE,
        Status.SEVERAL_IMAGES,
        Status.EXACT,
        Status.EXACT,
        Status.NOT_FINITE,
    ]
    assert verdicts == tuple(status.words for status in words)
    assert torch.isnan(images[[0, 1, 2, 5]]).all()
    torch.testing.assert_close(images[3:5], pair.images[3:5].float(), rtol=0, atol=1e-5)


def test_a_batch_of_bad_leaks_is_no_crash(exact):
    generator, pair = exact
    images = generator({name: torch.zeros_like(gradient[:2]) for name, gradient in pair.gradients.items()})
    assert torch.isnan(images).all()


def test_what_was_fitted_survives_a_checkpoint(exact):
    generator, pair = exact
    other = ExactGenerator(generator.architecture, ExactGeneratorConfig())
    other.load_state_dict(generator.state_dict())
    gradients = {name: gradient[:2] for name, gradient in pair.gradients.items()}
    torch.testing.assert_close(other(gradients), generator(gradients))
    assert set(other.estimated_parameters()) == set(generator.architecture.parameter_shapes)


def test_a_vision_transformer_gives_its_image_without_any_weight(make_pairs):
    settings = ViTConfig(patch_size=4, hidden_size=48, depth=1, heads=2, mlp_size=16)
    leaked, pair = make_pairs(settings, n=3, dtype="float32")
    generator = run_fits(ExactGenerator(leaked.architecture, ExactGeneratorConfig()), [pair])
    assert not generator.estimated_parameters()
    images, verdicts, _ = generator.reconstruct(pair.gradients)
    assert (images - pair.images).square().mean() < 1e-6
    assert verdicts == (DETERMINED,) * 3


def test_where_the_walk_stops_a_regression_stands_in_and_says_so(make_pairs):
    leaked, pair = make_pairs(ResNetConfig(width=4), n=80, dtype="float32")
    generator = run_fits(ExactGenerator(leaked.architecture, ExactGeneratorConfig()), [pair])
    images, verdicts, _ = generator.reconstruct({name: gradient[:3] for name, gradient in pair.gradients.items()})
    assert torch.isfinite(images).all()
    assert verdicts == (Status.ESTIMATE.words,) * 3
    assert "regression" in generator.describe()


def test_descent_on_the_image_alone_trains_the_weights_that_carry(make_pairs):
    """Near the leaked weights: from random ones the image leaves its bounds, and its error is a matter of luck."""
    leaked, pair = make_pairs(LeNetConfig(width=6), n=300)
    settings = ExactGeneratorConfig(fit="descent", objective="image", start="layerwise")
    generator = run_fits(ExactGenerator(leaked.architecture, settings), [pair])
    assert list(generator.estimated_parameters()) == ["linear.weight", "conv3.weight", "conv2.weight"]
    few = {name: gradient[:16] for name, gradient in pair.gradients.items()}
    assert not generator.has_own_loss
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-4)
    losses = []
    for _ in range(10):
        loss = (generator(few) - pair.images[:16]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_descent_may_start_from_the_closed_form(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=6), n=300)
    settings = ExactGeneratorConfig(fit="descent", start="layerwise")
    generator = run_fits(ExactGenerator(leaked.architecture, settings), [pair])
    truth = dict(leaked.network.named_parameters())["conv3.weight"].double()
    found = generator.estimated_parameters()["conv3.weight"].value
    assert (found - truth).norm() / truth.norm() < 1e-8


def test_settings_that_do_not_fit_are_named(lenet_architecture, mlp_architecture, tmp_path):
    with pytest.raises(ConfigError, match=r"data.client_batch_size: 2.*generator.name=hybrid"):
        ExactGenerator(lenet_architecture, ExactGeneratorConfig(), client_batch_size=2)
    with pytest.raises(ConfigError, match=r"generator.parameters"):
        ExactGenerator(lenet_architecture, ExactGeneratorConfig(parameters=5000))
    for objective in ("layers", "image"):
        with pytest.raises(ConfigError, match=r"generator.fit: descent has nothing to train"):
            ExactGenerator(mlp_architecture, ExactGeneratorConfig(fit="descent", objective=objective))
    missing = ExactGenerator(lenet_architecture, ExactGeneratorConfig(start=str(tmp_path / "none")))
    with pytest.raises(CheckpointError, match=r"generator.start: .* does not exist"):
        list(missing.fits())


class Shifted(nn.Module):
    """Takes images of [-1, 1], as many models do."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images * 2 - 1)


def convolutional(activation):
    torch.manual_seed(4)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, 2, 1), activation(), nn.Conv2d(6, 6, 3, 1, 1), activation()),
        *(nn.Flatten(), nn.Linear(96, 6)),
    ).requires_grad_(False)


@pytest.mark.parametrize("activation", [nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.LogSigmoid, nn.Tanh])
def test_activations_that_are_one_to_one_and_shifted_inputs_let_the_image_through(activation):
    network = Shifted(convolutional(activation))
    architecture = Architecture.of(network, (1, 8, 8), 6)
    images, labels = torch.rand(300, 1, 1, 8, 8), torch.randint(6, (300, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype="float64"))(images, labels)
    pair = GradientPair(gradients, images, labels, torch.arange(300).view(300, 1))
    generator = run_fits(ExactGenerator(architecture, ExactGeneratorConfig()), [pair])
    found = generator.reconstruct({name: gradient[:4] for name, gradient in gradients.items()})
    assert found.verdicts == (DETERMINED,) * 4
    torch.testing.assert_close(found.images, images[:4], rtol=0, atol=1e-4)


class Added(nn.Module):
    """Adds a buffer, whose value no attacker knows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("added", torch.full((6, 1, 1), 0.3))

    def forward(self, x):
        return x + self.added


class Embedded(nn.Module):
    """Patches with a learned position each, whose gradient is δ: of fewer entries than pixels."""

    def __init__(self):
        super().__init__()
        self.patches, self.positions = nn.Conv2d(1, 6, 2, 2), nn.Parameter(torch.randn(16, 6))
        self.head = nn.Linear(96, 6)

    def forward(self, x):
        return self.head((self.patches(x).flatten(2).transpose(1, 2) + self.positions).sigmoid().flatten(1))


def verdicts_and_errors(network, dtype="float64"):
    torch.manual_seed(0)
    network = network.requires_grad_(False)
    architecture = Architecture.of(network, (1, 8, 8), 6)
    images, labels = torch.rand(300, 1, 1, 8, 8), torch.randint(6, (300, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype=dtype))(images, labels)
    pair = GradientPair(gradients, images, labels, torch.arange(300).view(300, 1))
    generator = ExactGenerator(architecture, ExactGeneratorConfig(matching_epochs=1))
    for fit in generator.fits():
        add(fit, pair)
        fit.sums()
        fit.finish()
    generator.fitted.fill_(True)
    images = torch.cat([images[:6], torch.zeros(1, 1, 1, 8, 8)])
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype=dtype))(images, torch.ones(7, 1).long())
    found = generator.reconstruct(gradients)
    return found.verdicts, (found.images - images).abs().flatten(1).amax(dim=1)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), Added(), nn.Sigmoid(), nn.Flatten(), nn.Linear(96, 6)),
        Embedded(),
        nn.Sequential(nn.Hardtanh(0.2, 0.8), convolutional(nn.Sigmoid)),
        nn.Sequential(Shifted(nn.ReLU()), convolutional(nn.Sigmoid)),
        nn.Sequential(Shifted(nn.GELU()), convolutional(nn.Sigmoid)),
    ],
    ids=["too few equations", "position embedding", "clipped images", "images with ReLU", "images with GELU"],
)
def test_an_image_that_is_not_determined_is_not_called_so(network):
    verdicts, errors = verdicts_and_errors(network)
    assert (errors[:6] > 0.1).all()
    assert set(verdicts) == {Status.ESTIMATE.words}


def test_a_first_relu_takes_nothing_of_images_that_are_never_negative():
    verdicts, errors = verdicts_and_errors(nn.Sequential(nn.ReLU(), convolutional(nn.Sigmoid)))
    assert (errors < 1e-5).all()
    assert set(verdicts) == {DETERMINED}


def test_gradient_matching_passes_a_hardsigmoid():
    verdicts, _ = verdicts_and_errors(convolutional(nn.Hardsigmoid))
    assert set(verdicts) <= {status.words for status in Status if status is not Status.EXACT}


def test_a_regression_stands_on_what_is_not_too_large_for_it():
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 12), nn.ReLU()),
        nn.Linear(12, 5),
    )
    architecture = Architecture.of(network, (1, 8, 8), 5)
    assert ExactGenerator(architecture, ExactGeneratorConfig(ridge_features=76)).features == ["3", "5"]
    assert ExactGenerator(architecture, ExactGeneratorConfig(ridge_features=63)).features == ["5"]
    with pytest.raises(ConfigError, match=r"generator.ridge_features: 11 is less .* Give 12 or more"):
        ExactGenerator(architecture, ExactGeneratorConfig(ridge_features=11))


def test_a_model_that_gives_nothing_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False))
    with pytest.raises(Exception, match=r"generator.name=mlp"):
        ExactGenerator(Architecture.of(model, (3, 4, 4), 2), ExactGeneratorConfig())


def test_a_fully_connected_model_is_described(mlp_architecture):
    assert "none is needed" in ExactGenerator(mlp_architecture, ExactGeneratorConfig()).describe()
    assert FullyConnectedConfig().name == "mlp"


def partly_frozen(names, activation):
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 14), activation, nn.Linear(14, 12), activation, nn.Linear(12, 6)
    )
    for name in names:
        dict(network.named_parameters())[name].requires_grad_(False)
    return network


def with_batch_norm_in_a_chain():
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 4, 3), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 6))


@pytest.mark.parametrize(
    "network",
    [
        *(partly_frozen([name], nn.Sigmoid()) for name in ("1.weight", "1.bias")),
        partly_frozen(["1.weight", "1.bias"], nn.Sigmoid()),
        partly_frozen(["1.bias"], nn.ReLU()),
        with_batch_norm_in_a_chain(),
    ],
    ids=["weight", "bias", "layer", "relu", "batch norm"],
)
def test_weights_that_nothing_tells_end_the_fits_and_are_no_crash(network):
    architecture = Architecture.of(network.eval(), (3, 4, 4), 6)
    images, labels = torch.rand(100, 1, 3, 4, 4), torch.randint(6, (100, 1))
    gradients = GradientEngine(network, architecture, GradientsConfig(dtype="float64"))(images, labels)
    pair = GradientPair(gradients, images, labels, torch.arange(100).view(100, 1))
    generator = run_fits(ExactGenerator(architecture, ExactGeneratorConfig(matching_epochs=1)), [pair])
    found, verdicts, _ = generator.reconstruct(gradients)
    for image, wanted, verdict in zip(found, images, verdicts, strict=True):
        if verdict == DETERMINED:
            torch.testing.assert_close(image, wanted, rtol=0, atol=1e-3)
    assert torch.isfinite(found).all()
