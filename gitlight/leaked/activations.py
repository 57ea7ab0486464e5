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

# Others that models are written with. Gates (GLU) and normalisations (Softmax) are not activations in this sense.
_REPLACEABLE = (
    *_ACTIVATIONS.values(),
    *(nn.ReLU6, nn.RReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid),
)


def activation(name: str) -> nn.Module:
    """The activation function called ``name`` in `LeakedConfig`, as a module."""
    return _ACTIVATIONS[name]()


def replace_activations(network: nn.Module, name: str) -> int:
    """Put the activation called ``name`` in the place of every activation module, at any depth.

    Functions called in a ``forward``, such as ``torch.relu``, are not modules and stay.

    Returns:
        The number of places.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Sequential(nn.ELU()))
    >>> replace_activations(network, "tanh")
    2
    >>> network[1]
    Tanh()
    """
    places = [
        (parent, child_name)
        for parent in network.modules()
        for child_name, child in parent._modules.items()  # named_children would leave out a module's second name
        if isinstance(child, _REPLACEABLE)
    ]
    for parent, child_name in places:
        setattr(parent, child_name, activation(name))
    return len(places)
