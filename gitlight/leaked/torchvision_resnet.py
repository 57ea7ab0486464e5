"""torchvision's residual networks, whose stem is for ImageNet: a 7×7 convolution of stride 2 and max pooling."""

from torch import nn
from torchvision import models

from gitlight.architecture import ImageShape
from gitlight.config import LeakedConfig, TorchvisionResNet18Config, TorchvisionResNet50Config
from gitlight.leaked.activations import replace_activations


def torchvision_resnet18(settings: TorchvisionResNet18Config, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """ResNet-18 (He et al. 2016) as torchvision builds and initialises it; 11.7 million parameters for ImageNet.

    Weights that torchvision publishes for it fit, through ``leaked.weights``, with colour images and 1,000 classes.

    Args:
        settings: activation.
        image_shape: ``(C, H, W)``, of any size; the stem divides height and width by 4.
        n_classes: number of outputs.

    >>> from gitlight.config import TorchvisionResNet18Config
    >>> sum(p.numel() for p in torchvision_resnet18(TorchvisionResNet18Config(), (3, 224, 224), 1000).parameters())
    11689512
    """
    return _leaking(models.resnet18(weights=None, num_classes=n_classes), settings, image_shape)


def torchvision_resnet50(settings: TorchvisionResNet50Config, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """ResNet-50 (He et al. 2016, stride in the 3×3 convolution) as torchvision builds it; 25.6 million parameters.

    Weights, arguments and images as for `torchvision_resnet18`.
    """
    return _leaking(models.resnet50(weights=None, num_classes=n_classes), settings, image_shape)


def _leaking(network: models.ResNet, settings: LeakedConfig, image_shape: ImageShape) -> nn.Module:
    """The network for images of any number of channels, with the activation asked for."""
    stem, channels = network.conv1, image_shape[0]
    if channels != stem.in_channels:
        network.conv1 = nn.Conv2d(channels, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=False)
        # torchvision's own initial weights, which do not depend on the number of input channels.
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    replace_activations(network, settings.activation)
    return network
