"""Activation functions of leaked models, by name."""

from torch import nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    """The activation function called ``name`` in `LeakedConfig`, as a module."""
    return _ACTIVATIONS[name]()
