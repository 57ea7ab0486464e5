"""A fully connected network."""

import itertools
from collections import OrderedDict
from math import prod

from torch import nn

from gitlight.architecture import ImageShape
from gitlight.config import FullyConnectedConfig
from gitlight.leaked.activations import activation


def fully_connected(settings: FullyConnectedConfig, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """Linear layers with activations between them, on the flattened image.

    Args:
        settings: activation and sizes of the hidden layers (none: softmax regression).
        image_shape: ``(C, H, W)``.
        n_classes: number of outputs.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    sizes = [prod(image_shape), *settings.hidden_sizes]
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
        layers[f"linear{number}"] = nn.Linear(inputs, outputs)
        layers[f"activation{number}"] = activation(settings.activation)
    layers[f"linear{len(sizes)}"] = nn.Linear(sizes[-1], n_classes)
    return nn.Sequential(layers)
