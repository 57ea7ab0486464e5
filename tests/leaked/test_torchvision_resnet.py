import pytest
import torch
from torch import nn
from torchvision import models

from gitlight.config import TorchvisionResNet18Config, TorchvisionResNet50Config
from gitlight.leaked.model import LeakedModel
from gitlight.leaked.torchvision_resnet import torchvision_resnet18, torchvision_resnet50

BOTH = [
    (torchvision_resnet18, TorchvisionResNet18Config, models.resnet18),
    (torchvision_resnet50, TorchvisionResNet50Config, models.resnet50),
]


@pytest.mark.parametrize(("build", "config", "published"), BOTH)
def test_published_weights_fit(build, config, published):
    with torch.device("meta"):
        wanted, found = published().state_dict(), build(config(), (3, 224, 224), 1000).state_dict()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in wanted.items()}


def test_it_computes_what_torchvisions_does(tmp_path):
    torch.manual_seed(0)
    reference = models.resnet18(num_classes=7).eval()
    torch.save(reference.state_dict(), tmp_path / "published.pth")
    settings = TorchvisionResNet18Config(weights=str(tmp_path / "published.pth"))
    leaked = LeakedModel(settings, (3, 40, 40), 7)
    images = torch.rand(2, 3, 40, 40)
    assert torch.equal(leaked(images), reference(images))


def test_grey_images_have_a_stem_of_their_own():
    leaked = LeakedModel(TorchvisionResNet18Config(), (1, 16, 16), 10)
    assert leaked.network.conv1.weight.shape == (64, 1, 7, 7)
    # He et al. 2015, fan out: √(2 / (64 · 49)), as torchvision's for colour.
    assert leaked.network.conv1.weight.std() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    assert leaked(torch.rand(2, 1, 16, 16)).shape == (2, 10)


def test_no_activation_works_in_place():
    with torch.device("meta"):
        network = torchvision_resnet50(TorchvisionResNet50Config(), (3, 32, 32), 10)
    assert not any(module.inplace for module in network.modules() if isinstance(module, nn.ReLU))
