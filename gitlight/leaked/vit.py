"""Vision transformers (Dosovitskiy et al. 2021): torchvision's, with a learned position embedding and a class token."""

from math import sqrt

import torch
from torch import nn
from torchvision.models import vision_transformer

from gitlight.architecture import ImageShape
from gitlight.config import LeakedConfig, ViTB16Config, ViTConfig
from gitlight.errors import ConfigError
from gitlight.leaked.activations import activation

_B_16_PATCH = 16


def vit(settings: ViTConfig, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """A vision transformer for small images.

    By default it is as wide as the smallest of Touvron et al. 2021 (192, three heads), with half its twelve blocks and
    patches of 4×4 pixels.

    Args:
        settings: activation, size of a patch, and the transformer's sizes.
        image_shape: ``(C, H, W)``, square.
        n_classes: number of outputs.

    Raises:
        ConfigError: the images are not square, a size does not divide the one that it has to divide, or the
            transformer is too narrow for positions that are not learned.

    >>> from gitlight.config import ViTConfig
    >>> sum(p.numel() for p in vit(ViTConfig(), (3, 32, 32), 10).parameters())
    2693578
    """
    size = _side(image_shape, settings.name)
    if size % settings.patch_size:
        raise ConfigError(
            f"leaked.patch_size: patches of {settings.patch_size} pixels do not fill images of {size}×{size}; "
            f"give a divisor of data.image_size."
        )
    if settings.hidden_size % settings.heads:
        raise ConfigError(
            f"leaked.heads: {settings.heads} heads cannot share leaked.hidden_size: {settings.hidden_size} equally; "
            f"give a divisor of {settings.hidden_size}."
        )
    network = vision_transformer.VisionTransformer(
        image_size=size,
        patch_size=settings.patch_size,
        num_layers=settings.depth,
        num_heads=settings.heads,
        hidden_dim=settings.hidden_size,
        mlp_dim=settings.mlp_size,
        num_classes=n_classes,
    )
    if not settings.learned_positions:
        _fix_positions(network.encoder, size // settings.patch_size, settings.hidden_size)
    return _leaking(network, settings, image_shape)


def _fix_positions(encoder: nn.Module, side: int, width: int) -> None:
    """Sines and cosines of a patch's row and column instead of parameters (Beyer et al. 2022, arXiv 2205.01580).

    A quarter of the width each; what four does not divide, and the class token's position, stay zero.
    """
    quarter = width // 4
    if quarter == 0:
        raise ConfigError(
            f"leaked.hidden_size: {width} is too narrow for positions in sines and cosines, which take 4 at least; "
            "give leaked.learned_positions=true."
        )
    frequencies = 10000.0 ** -(torch.arange(quarter) / max(1, quarter - 1))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    positions = torch.zeros(1, 1 + side**2, width)
    positions[0, 1:, : 4 * quarter] = waves
    del encoder.pos_embedding
    encoder.register_buffer("pos_embedding", positions)


def vit_b_16(settings: ViTB16Config, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """ViT-B/16: twelve blocks, 768 wide, patches of 16×16 pixels; 86.6 million parameters for ImageNet.

    Weights that torchvision publishes for it fit, through ``leaked.weights``, where image size and classes do.

    Args:
        settings: activation.
        image_shape: ``(C, H, W)``, square.
        n_classes: number of outputs.

    Raises:
        ConfigError: the images are not square, or their size is not a multiple of 16.
    """
    size = _side(image_shape, settings.name)
    if size % _B_16_PATCH:
        raise ConfigError(
            f"data.image_size: {size} is not a multiple of {_B_16_PATCH}, the patch size of vit_b_16; "
            f"give one, or choose a patch size with leaked.name=vit."
        )
    network = vision_transformer.vit_b_16(weights=None, num_classes=n_classes, image_size=size)
    return _leaking(network, settings, image_shape)


def _side(image_shape: ImageShape, name: str) -> int:
    _, height, width = image_shape
    if height != width:
        raise ConfigError(f"leaked.name: {name!r} takes square images, and these have {height}×{width} pixels.")
    return height


def _leaking(
    network: vision_transformer.VisionTransformer, settings: LeakedConfig, image_shape: ImageShape
) -> nn.Module:
    """The network for images of any number of channels, with the activation asked for and a head that leaks."""
    patches, channels = network.conv_proj, image_shape[0]
    if channels != patches.in_channels:
        network.conv_proj = nn.Conv2d(channels, patches.out_channels, patches.kernel_size, patches.stride)
        # torchvision's own initial weights, for its three channels.
        nn.init.trunc_normal_(network.conv_proj.weight, std=sqrt(1 / network.conv_proj.weight[0].numel()))
        nn.init.zeros_(network.conv_proj.bias)
    for block in network.encoder.layers:
        block.mlp[1] = activation(settings.activation)
    # torchvision starts the head at zero. All gradients below a zero head are zero: with initial weights the head alone
    # would leak. It gets PyTorch's weights for linear layers instead.
    network.heads.head.reset_parameters()
    return network
