"""Client batches whose images are solved for together, below the last layer."""

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, HybridGeneratorConfig
from gitlight.generators.exact.separated import SeparatedFeatures
from gitlight.generators.hybrid import HybridGenerator
from gitlight.gradients.engine import GradientEngine


def multilayer_perceptron(n_images, activation, dtype):
    """Features of client batches on a perceptron, fitted on single images; its leaks, and the images behind them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 40), activation, nn.Linear(40, 24), activation, nn.Linear(24, 8)
    )
    network.to(dtype)
    architecture = Architecture.of(network, (3, 4, 4), 8)
    engine = GradientEngine(network, architecture, GradientsConfig(dtype=str(dtype).removeprefix("torch.")))
    features = SeparatedFeatures(architecture, None, n_images)
    single = torch.rand(800, 1, 3, 4, 4, dtype=dtype)
    gradients = engine(single, torch.randint(8, (800, 1)))
    for fit in features.fits():
        fit.update(gradients, single, torch.arange(800))
        fit.finish()
    images = torch.rand(40, n_images, 3, 4, 4, dtype=dtype)
    labels = torch.stack([torch.randperm(8)[:n_images] for _ in range(40)])
    return features, engine(images, labels), images


@pytest.mark.parametrize(
    ("activation", "dtype", "error"), [(nn.Sigmoid(), torch.float64, 1e-6), (nn.Tanh(), torch.float32, 1e-3)]
)
def test_all_images_of_a_client_batch_are_found_where_equations_reach_them(activation, dtype, error):
    features, gradients, images = multilayer_perceptron(3, activation, dtype)
    assert features.reaches_the_image
    assert features.end == "the image is reached"
    values, levels, _ = features(gradients)
    found = values[-1].view(images.shape)
    order = torch.cdist(images.double().flatten(2), found.flatten(2)).argmin(dim=2)
    assert (order.sort(dim=1).values == torch.arange(3)).all(dim=1).double().mean() > 0.9
    matched = found.gather(1, order.view(40, 3, 1, 1, 1).expand_as(found))
    errors = (matched - images).abs().flatten(2).max(dim=2).values
    assert (errors < error).double().mean() > 0.9
    stated = 10 ** levels[:, -1].view(40, 3).gather(1, order)
    assert (errors < 100 * stated).double().mean() > 0.9


def test_hybrid_keeps_what_is_exact_and_refines_the_rest():
    features, gradients, images = multilayer_perceptron(3, nn.Tanh(), torch.float32)
    chosen = HybridGeneratorConfig(channels=8, blocks=1, gradient_channels=2)
    torch.manual_seed(0)
    generator = HybridGenerator(features._architecture, chosen, 3)
    generator.walk.load_state_dict(features.state_dict())
    assert generator.refinement is not None
    nn.init.normal_(generator.refinement.leave.weight, std=0.1)
    found = generator(gradients)
    levels = generator.walk(gradients).levels[:, -1].view(40, 3)
    order = torch.cdist(images.flatten(2), found.flatten(2)).argmin(dim=2)
    errors = (found.gather(1, order.view(40, 3, 1, 1, 1).expand_as(found)) - images).abs().flatten(2).amax(dim=2)
    sure = levels.gather(1, order) < -4
    assert sure.double().mean() > 0.5
    assert errors[sure].max() < 0.01
    loss = (found - images).square().mean()
    loss.backward()
    assert generator.refinement.leave.weight.grad.any()


class Branches(nn.Module):
    """Two layers side by side, of which the equations of several images reach one alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 6), nn.Linear(12, 6)
        self.h = nn.Linear(12, 7)

    def forward(self, images):
        flat = images.flatten(1)
        return self.h(torch.cat([torch.tanh(self.b(flat)), torch.sin(self.a(flat))], dim=1))


def test_single_images_are_solved_for_wherever_client_batches_are():
    torch.manual_seed(0)
    network = Branches()
    architecture = Architecture.of(network, (3, 2, 2), 7)
    engine = GradientEngine(network, architecture, GradientsConfig())
    features = SeparatedFeatures(architecture, None, 2)
    images = torch.rand(200, 1, 3, 2, 2)
    gradients = engine(images, torch.randint(7, (200, 1)))
    for fit in features.fits():
        fit.update(gradients, images, torch.arange(200))
        fit.finish()
    values = features(engine(torch.rand(5, 2, 3, 2, 2), torch.randint(7, (5, 2)))).values
    assert len(values) == len(features.features)
