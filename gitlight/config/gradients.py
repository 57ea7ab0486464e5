"""Settings of how gradients are made, and of the channel that they pass."""

from dataclasses import dataclass, field

from gitlight.config.fields import setting


@dataclass
class UpdatesConfig:
    """What a client computes before it shares: a gradient, or the update of several local steps of SGD (FedAvg)."""

    epochs: int = setting(
        1, "passes of a client over its batch; one step in all leaks the gradient, several an update", minimum=1
    )
    batch_size: int | None = setting(
        None, "images in a local step; null: the whole client batch; the last of an epoch may be smaller", minimum=1
    )
    learning_rate: float = setting(0.1, "rate of the client's SGD; of no effect on a single step", above=0)


@dataclass
class SketchConfig:
    """Random linear projections of gradients that are too large for a generator."""

    name: str = setting(
        "none", "none: gradients stay whole; count: a count sketch of each large parameter's", choices=["none", "count"]
    )
    size: int = setting(1024, "entries of each sketch", minimum=1)
    seed: int = setting(0, "seed of the projections", minimum=0)
    keep_exact: list[str] | None = setting(
        None, "parameters (names, with * and ?) to keep whole; null: the last layer's, biases, embeddings, class tokens"
    )


@dataclass
class GradientsConfig:
    """How gradients are made."""

    method: str = setting(
        "auto",
        "how per-leak gradients are made; auto: captured where every operation has a rule, else vmap; compiled: vmap "
        "by torch.compile, which takes from seconds to minutes first; with several local steps: auto, vmap or loop",
        choices=["auto", "captured", "vmap", "compiled", "loop"],
    )
    memory_limit_gb: float = setting(2.0, "memory for making one batch of gradients, per device, in GB", above=0)
    dtype: str = setting("float32", "precision that gradients are made and kept in", choices=["float32", "float64"])
    updates: UpdatesConfig = field(default_factory=UpdatesConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)


@dataclass
class ChannelConfig:
    """A stage that gradients pass on their way to the attacker."""

    name: str = setting("gaussian_noise", "channel stage")


@dataclass
class GaussianNoiseConfig(ChannelConfig):
    """White noise on the gradient."""

    relative_std: float = setting(
        0.01, "standard deviation of the noise over the root mean square of the leak's gradient entries", minimum=0
    )
    lowest_std: float | None = setting(
        None,
        "draw each leak's level between this and relative_std, uniformly in its logarithm, so that one generator "
        "learns the whole range; 0: from no noise that shows (1e-7) up; null: relative_std for all",
        minimum=0,
    )


@dataclass
class PruningConfig(ChannelConfig):
    """Sparsification of the gradient."""

    name: str = setting("pruning", "channel stage")
    fraction: float = setting(0.9, "share of each tensor's entries, the smallest, set to zero", minimum=0, maximum=1)
