"""Leaked models: the networks whose gradients leak."""

from gitlight.config import (
    CustomConfig,
    FullyConnectedConfig,
    GivenConfig,
    LeNetConfig,
    ResNet18Config,
    ResNetConfig,
    TorchvisionResNet18Config,
    TorchvisionResNet50Config,
    ViTB16Config,
    ViTConfig,
)
from gitlight.registry import Registry

LEAKED_MODELS = Registry("leaked model", "leaked")
LEAKED_MODELS.register("lenet", "gitlight.leaked.lenet:lenet", LeNetConfig)
LEAKED_MODELS.register("mlp", "gitlight.leaked.mlp:fully_connected", FullyConnectedConfig)
LEAKED_MODELS.register("resnet20", "gitlight.leaked.resnet:resnet20", ResNetConfig)
LEAKED_MODELS.register("resnet18", "gitlight.leaked.resnet:resnet18", ResNet18Config)
LEAKED_MODELS.register("vit", "gitlight.leaked.vit:vit", ViTConfig)
LEAKED_MODELS.register("vit_b_16", "gitlight.leaked.vit:vit_b_16", ViTB16Config)
LEAKED_MODELS.register(
    "torchvision_resnet18", "gitlight.leaked.torchvision_resnet:torchvision_resnet18", TorchvisionResNet18Config
)
LEAKED_MODELS.register(
    "torchvision_resnet50", "gitlight.leaked.torchvision_resnet:torchvision_resnet50", TorchvisionResNet50Config
)
LEAKED_MODELS.register("custom", "gitlight.leaked.custom:custom", CustomConfig)
LEAKED_MODELS.register("given", "gitlight.leaked.custom:not_given", GivenConfig)
