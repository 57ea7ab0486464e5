"""LeNet as the gradient-inversion literature uses it (Zhu et al. 2019): three 5×5 convolutions and a linear layer."""

from collections import OrderedDict

from torch import nn

from gitlight.architecture import ImageShape
from gitlight.config import LeNetConfig
from gitlight.leaked.activations import activation


def lenet(settings: LeNetConfig, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """Three convolutions (5×5, strides 2, 2, 1, padding 2), each with an activation, and a linear layer.

    Args:
        settings: activation and width (channels of each convolution).
        image_shape: ``(C, H, W)``.
        n_classes: number of outputs.

    >>> from gitlight.config import LeNetConfig
    >>> sum(p.numel() for p in lenet(LeNetConfig(), (3, 32, 32), 10).parameters())
    15826
    """
    channels, height, width = image_shape
    features = settings.width * -(-height // 4) * -(-width // 4)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, stride) in enumerate([(channels, 2), (settings.width, 2), (settings.width, 1)], start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, settings.width, kernel_size=5, stride=stride, padding=2)
        layers[f"activation{number}"] = activation(settings.activation)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(features, n_classes)
    return nn.Sequential(layers)
