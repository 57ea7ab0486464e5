"""Residual networks for small images: ResNet-20 of He et al. 2016, §4.2, and ResNet-18 with the same stem."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from gitlight.architecture import ImageShape
from gitlight.config import LeakedConfig, ResNet18Config, ResNetConfig
from gitlight.leaked.activations import activation

# Blocks of each stage. A block has 2 convolutions; with the stem and the linear layer that makes 20 and 18 layers.
_RESNET20_BLOCKS = (3, 3, 3)
_RESNET18_BLOCKS = (2, 2, 2, 2)


class ResidualBlock(nn.Module):
    """He et al.'s basic block: two 3×3 convolutions with batch norm, added to a shortcut.

    The shortcut is the identity where shapes allow, otherwise a 1×1 convolution with batch norm (their option B).
    Option A, which skips pixels and pads channels with zeros, has no parameters, so it leaks no gradient of its own;
    B is what the networks of the gradient-inversion literature have (Geiping et al. 2020).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation_name: str) -> None:
        """Args: channels in and out, stride of the first convolution and the shortcut, activation function."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.activation1 = activation(activation_name)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=projection, norm=nn.BatchNorm2d(outputs)))
        self.activation2 = activation(activation_name)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, ⌈H / stride⌉, ⌈W / stride⌉)``."""
        residual = self.norm2(self.conv2(self.activation1(self.norm1(self.conv1(images)))))
        summed: Tensor = self.activation2(residual + self.shortcut(images))
        return summed


def resnet20(settings: ResNetConfig, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """A 3×3 convolution, nine residual blocks at three resolutions, average pooling and a linear layer.

    Convolutions have Kaiming's initial weights (He et al. 2015).

    Args:
        settings: activation, and width (channels of the first stage; 16 in the paper).
        image_shape: ``(C, H, W)``.
        n_classes: number of outputs.

    >>> from gitlight.config import LeakedConfig, ResNet18Config, ResNetConfig
    >>> sum(p.numel() for p in resnet20(ResNetConfig(), (3, 32, 32), 10).parameters())
    272474
    """
    return _residual_network(settings, settings.width, _RESNET20_BLOCKS, image_shape, n_classes)


def resnet18(settings: ResNet18Config, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """ResNet-18 of He et al. 2016 (Table 1) with the stem for small images: a 3×3 convolution of stride 1, no pooling.

    Four stages of two blocks; convolutions have Kaiming's initial weights. This is the ResNet-18 that the
    gradient-inversion literature attacks on CIFAR-10 (Geiping et al. 2020).

    Args:
        settings: activation, and width (channels of the first stage; 64 in the paper).
        image_shape: ``(C, H, W)``.
        n_classes: number of outputs.

    >>> from gitlight.config import ResNet18Config
    >>> sum(p.numel() for p in resnet18(ResNet18Config(), (3, 32, 32), 10).parameters())
    11173962
    """
    return _residual_network(settings, settings.width, _RESNET18_BLOCKS, image_shape, n_classes)


def _residual_network(
    settings: LeakedConfig, width: int, blocks: Sequence[int], image_shape: ImageShape, n_classes: int
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(image_shape[0], width, kernel_size=3, padding=1, bias=False)
    layers["norm"] = nn.BatchNorm2d(width)
    layers["activation"] = activation(settings.activation)
    inputs = width
    for stage, n_blocks in enumerate(blocks):
        outputs = width * 2**stage
        for block in range(n_blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers[f"stage{stage + 1}_block{block + 1}"] = ResidualBlock(inputs, outputs, stride, settings.activation)
            inputs = outputs
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(inputs, n_classes)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
