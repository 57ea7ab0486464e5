"""torchvision's normalisation within a leaked model."""

import pytest
import torch
from plain_autograd import plain_gradients, relative_error
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

from gitlight.config import GivenConfig, GradientsConfig
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked.model import LeakedModel

SHAPE = (3, 8, 8)


@pytest.mark.parametrize("normalize", [transforms.Normalize, v2.Normalize])
@pytest.mark.parametrize("method", ["loop", "vmap", "captured"])
def test_torchvisions_normalisation_is_part_of_the_model(normalize, method):
    torch.manual_seed(0)
    network = nn.Sequential(normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)), nn.Flatten(), nn.Linear(192, 5))
    leaked = LeakedModel(GivenConfig(), SHAPE, 5, network=network)
    images, labels = torch.rand(3, 1, *SHAPE), torch.randint(5, (3, 1))
    torch.testing.assert_close(leaked(images[:, 0]), network(images[:, 0]))
    assert isinstance(network[0], normalize), "the user's own is never changed"
    assert leaked.network.state_dict().keys() == network.state_dict().keys()
    engine = GradientEngine(leaked.network, leaked.architecture, GradientsConfig(method=method, dtype="float64"))
    found = engine(images, labels)
    wanted = plain_gradients(network.double(), images, labels)
    assert relative_error(found, wanted) < 1e-6


class Twice(v2.Normalize):
    def forward(self, image):
        return 2 * (image - self.mean[0]) / self.std[0]


class UnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
        self.head = nn.Linear(192, 5)

    def forward(self, images):
        return self.head((self.first(images) + self.second(images)).flatten(1))


@pytest.mark.parametrize(
    "network", [nn.Sequential(Twice((0.5,), (0.2,)), nn.Flatten(), nn.Linear(192, 5)), UnderTwoNames()]
)
def test_what_stands_for_a_normalisation_computes_the_same(network):
    leaked = LeakedModel(GivenConfig(), SHAPE, 5, network=network)
    images = torch.rand(3, *SHAPE)
    torch.testing.assert_close(leaked(images), network(images))
