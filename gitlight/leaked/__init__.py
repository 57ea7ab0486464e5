"""Leaked models: the networks whose gradients leak."""

from gitlight.config import FullyConnectedConfig, LeNetConfig, ResNetConfig, ViTB16Config, ViTConfig
from gitlight.registry import Registry

LEAKED_MODELS = Registry("leaked model", "leaked")
LEAKED_MODELS.register("lenet", "gitlight.leaked.lenet:lenet", LeNetConfig)
LEAKED_MODELS.register("mlp", "gitlight.leaked.mlp:fully_connected", FullyConnectedConfig)
LEAKED_MODELS.register("resnet20", "gitlight.leaked.resnet:resnet20", ResNetConfig)
LEAKED_MODELS.register("vit", "gitlight.leaked.vit:vit", ViTConfig)
LEAKED_MODELS.register("vit_b_16", "gitlight.leaked.vit:vit_b_16", ViTB16Config)
