"""Gradients: made per leak, and changed on their way to the attacker."""

from gitlight.config import GaussianNoiseConfig, PruningConfig
from gitlight.registry import Registry

CHANNELS = Registry("channel stage", "channel")
CHANNELS.register("gaussian_noise", "gitlight.gradients.channel:GaussianNoise", GaussianNoiseConfig)
CHANNELS.register("pruning", "gitlight.gradients.channel:Pruning", PruningConfig)
