"""Every leaked model on small images, at its smallest where it has a size."""

from torch import nn

from gitlight.config import (
    CustomConfig,
    FullyConnectedConfig,
    LeNetConfig,
    ResNet18Config,
    ResNetConfig,
    TorchvisionResNet18Config,
    TorchvisionResNet50Config,
    ViTB16Config,
    ViTConfig,
)
from gitlight.leaked.model import LeakedModel

SHAPE = (3, 16, 16)


def small_network(channels):
    stem = (nn.Conv2d(3, channels, 3, stride=4), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, nn.Flatten(), nn.Dropout(), nn.Linear(16 * channels, 10))


TINY_VIT = {"hidden_size": 6, "depth": 2, "heads": 2, "mlp_size": 10}
SMALL = {
    "lenet": (LeNetConfig, {"width": 3}),
    "mlp": (FullyConnectedConfig, {"hidden_sizes": [8]}),
    "resnet20": (ResNetConfig, {"width": 2}),
    "resnet18": (ResNet18Config, {"width": 2}),
    "vit": (ViTConfig, TINY_VIT),
    "custom": (CustomConfig, {"target": f"{__name__}:small_network", "arguments": {"channels": 4}}),
}
LARGE = {
    "torchvision_resnet18": (TorchvisionResNet18Config, {}),
    "torchvision_resnet50": (TorchvisionResNet50Config, {}),
    "vit_b_16": (ViTB16Config, {}),
}


def build(name, **settings):
    config, own = (SMALL | LARGE)[name]
    return LeakedModel(config(**own, **settings), SHAPE, 10)
