"""Settings of leaked models."""

from dataclasses import dataclass
from typing import Any

from gitlight.config.fields import setting

# Leaked models differ in the defaults of these two settings, not in what is allowed.
_ACTIVATION: dict[str, Any] = {
    "help": "activation function",
    "choices": ["sigmoid", "tanh", "relu", "leaky_relu", "gelu", "silu"],
}
_INIT: dict[str, Any] = {
    "help": "initial weights: all uniform in ±leaked.init_range, or the model's own (PyTorch's where it has none)",
    "choices": ["uniform", "default"],
}


@dataclass
class LeakedConfig:
    """Settings of every leaked model."""

    name: str = setting("lenet", "leaked model")
    activation: str = setting("sigmoid", **_ACTIVATION)
    init: str = setting("uniform", **_INIT)
    init_range: float = setting(0.5, "half the width of the uniform initialisation", above=0)
    seed: int = setting(
        0, "seed of the initial weights; apart from `seed`, so that runs can attack one model", minimum=0
    )
    weights: str | None = setting(None, "trained weights: a run folder of task=leaked, a checkpoint, or a state dict")
    batch_norm: str = setting(
        "running",
        "what batch norm normalises by: running: the model's running statistics; batch: those of the client's own "
        "batch, as in training mode",
        choices=["running", "batch"],
    )

    @property
    def title(self) -> str:
        """What results call the model."""
        return self.name


@dataclass
class LeNetConfig(LeakedConfig):
    """LeNet."""

    width: int = setting(12, "channels of every convolution", minimum=1)


@dataclass
class FullyConnectedConfig(LeakedConfig):
    """A fully connected network."""

    name: str = setting("mlp", "leaked model")
    hidden_sizes: list[int] = setting([512, 256], "units of each hidden layer", minimum=1)


@dataclass
class ResNetConfig(LeakedConfig):
    """ResNet-20, for small images."""

    name: str = setting("resnet20", "leaked model")
    activation: str = setting("relu", **_ACTIVATION)
    init: str = setting("default", **_INIT)
    width: int = setting(16, "channels of the first of three stages; each of the others doubles them", minimum=1)


@dataclass
class ResNet18Config(LeakedConfig):
    """ResNet-18, for small images."""

    name: str = setting("resnet18", "leaked model")
    activation: str = setting("relu", **_ACTIVATION)
    init: str = setting("default", **_INIT)
    width: int = setting(64, "channels of the first of four stages; each of the others doubles them", minimum=1)


@dataclass
class TorchvisionResNet18Config(LeakedConfig):
    """torchvision's ResNet-18, for ImageNet."""

    name: str = setting("torchvision_resnet18", "leaked model")
    activation: str = setting("relu", **_ACTIVATION)
    init: str = setting("default", **_INIT)


@dataclass
class TorchvisionResNet50Config(LeakedConfig):
    """torchvision's ResNet-50, for ImageNet."""

    name: str = setting("torchvision_resnet50", "leaked model")
    activation: str = setting("relu", **_ACTIVATION)
    init: str = setting("default", **_INIT)


@dataclass
class ViTConfig(LeakedConfig):
    """A vision transformer for small images."""

    name: str = setting("vit", "leaked model")
    activation: str = setting("gelu", **_ACTIVATION)
    init: str = setting("default", **_INIT)
    patch_size: int = setting(4, "height and width of a patch, in pixels; divides data.image_size", minimum=1)
    hidden_size: int = setting(192, "numbers that describe a patch", minimum=1)
    depth: int = setting(6, "transformer blocks", minimum=1)
    heads: int = setting(3, "attention heads of a block; divides leaked.hidden_size", minimum=1)
    mlp_size: int = setting(768, "hidden units of a block's multilayer perceptron", minimum=1)
    learned_positions: bool = setting(
        True,
        "whether the position embedding is a parameter, whose gradient gives the image away; else sines and cosines",
    )


@dataclass
class ViTB16Config(LeakedConfig):
    """ViT-B/16."""

    name: str = setting("vit_b_16", "leaked model")
    activation: str = setting("gelu", **_ACTIVATION)
    init: str = setting("default", **_INIT)


# A user's own model keeps what it has, unless something else is asked for.
_OWN_ACTIVATION: dict[str, Any] = {
    "help": "own: the model's; a name replaces every activation module by it",
    "choices": ["own", *_ACTIVATION["choices"]],
}


@dataclass
class CustomConfig(LeakedConfig):
    """A user's own model, by its dotted path."""

    name: str = setting("custom", "leaked model")
    activation: str = setting("own", **_OWN_ACTIVATION)
    init: str = setting("default", **_INIT)
    target: str | None = setting(None, "what makes the model: package.module:Class or package.module.function")
    arguments: dict[str, Any] = setting({}, "keyword arguments that leaked.target is called with")

    @property
    def title(self) -> str:
        """What results call the model."""
        return f"{self.name}:{self.target}"


@dataclass
class GivenConfig(LeakedConfig):
    """A user's own model, passed in Python: ``train(config, network=…)``."""

    name: str = setting("given", "leaked model")
    activation: str = setting("own", **_OWN_ACTIVATION)
    init: str = setting("default", **_INIT)
    type: str | None = setting(None, "class of the model that was passed; set by the run")

    @property
    def title(self) -> str:
        """What results call the model."""
        return f"{self.name}:{self.type}"
