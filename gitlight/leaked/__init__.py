"""Leaked models: the networks whose gradients leak."""

from gitlight.config import FullyConnectedConfig, LeNetConfig
from gitlight.registry import Registry

LEAKED_MODELS = Registry("leaked model", "leaked")
LEAKED_MODELS.register("lenet", "gitlight.leaked.lenet:lenet", LeNetConfig)
LEAKED_MODELS.register("mlp", "gitlight.leaked.mlp:fully_connected", FullyConnectedConfig)
