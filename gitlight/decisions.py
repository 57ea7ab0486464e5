"""What a run decides where its settings leave it open, and keeps: what generators are depends on training's leaks."""

from dataclasses import replace

from gitlight.config import (
    Config,
    GaussianNoiseConfig,
    HybridGeneratorConfig,
    LearnedGeneratorConfig,
    MLPGeneratorConfig,
)
from gitlight.errors import ConfigError
from gitlight.gradients.updates import describe_leak


def with_decisions(config: Config) -> Config:
    """The config, with what the generator's settings leave to the leaks that it is trained on.

    It is decided for the run, and kept in its config.yaml: a generator may be evaluated on other leaks.

    Raises:
        ConfigError: ``generator.separate`` or ``generator.noise_range`` asks for what is not possible.
    """
    settings = config.generator
    if isinstance(settings, LearnedGeneratorConfig):
        settings = _with_noise_range(settings, config)
    if not isinstance(settings, HybridGeneratorConfig):
        return replace(config, generator=settings)
    leak = describe_leak(config.gradients.updates, config.data.client_batch_size)
    # Equations hold of one gradient as it is.
    spoilt = bool(config.channel) or (leak != "gradient" and config.data.client_batch_size == 1)
    if settings.averages_of_inverted_layers is None:
        settings = replace(settings, averages_of_inverted_layers=spoilt)
    if settings.local_start is None:
        settings = replace(settings, local_start=True)
    if settings.closed_form_alone is None:
        settings = replace(settings, closed_form_alone=not spoilt)
    if leak != "gradient":
        if settings.separate:
            raise ConfigError(
                f"generator.separate: the images of one gradient can be told apart in closed form, and {leak} is not "
                "one. Give generator.separate=null."
            )
        settings = replace(settings, separate=False)
    return replace(config, generator=settings)


def with_decisions_of(config: Config, trained: Config) -> Config:
    """The config, with what training decided where its settings left it open."""
    settings, former = config.generator, trained.generator
    if type(settings) is not type(former):
        return config
    decided = ("separate", "noise_range", "averages_of_inverted_layers", "local_start", "closed_form_alone")
    its = [name for name in decided if hasattr(settings, name)]
    left_open = {name: getattr(former, name) for name in its if getattr(settings, name) is None}
    return replace(config, generator=replace(settings, **left_open))


def _with_noise_range(settings: LearnedGeneratorConfig, config: Config) -> LearnedGeneratorConfig:
    """With the channel's range of noise, where there is one that leaks tell and none is given."""
    possible = _noise_range(config)
    if settings.noise_range and possible is None:
        raise ConfigError(
            "generator.noise_range: the noise of a leak can be read off the whole gradient of one image, and pairs be "
            "made at each level of it, where the channel is one stage, gaussian_noise with lowest_std. Give "
            "generator.noise_range=null."
        )
    if isinstance(settings, HybridGeneratorConfig):
        # Where the noise is given, none is estimated, and all leaks are of one level.
        apart = settings.noise is not None or settings.forward_equations
    else:
        apart = isinstance(settings, MLPGeneratorConfig) and not settings.scale_inputs  # LTI as published
    return settings if settings.noise_range is not None or apart else replace(settings, noise_range=possible)


def _noise_range(config: Config) -> list[float] | None:
    """Of a channel that adds noise of several levels and does nothing else; None where a leak does not tell its level.

    That is read off the last layer's gradient, which has rank one but for noise. Averages over several images or steps,
    and pruned gradients, have not; and a sketch has not the size of the gradient that noise is relative to.
    """
    leak = describe_leak(config.gradients.updates, config.data.client_batch_size)
    if leak != "gradient" or config.data.client_batch_size > 1 or config.gradients.sketch.name != "none":
        return None
    if len(config.channel) != 1:
        return None
    (stage,) = config.channel
    if not isinstance(stage, GaussianNoiseConfig) or stage.lowest_std is None or stage.lowest_std >= stage.relative_std:
        return None
    return [stage.lowest_std, stage.relative_std]
