"""Settings of generators."""

from dataclasses import dataclass

from gitlight.config.fields import setting


@dataclass
class GeneratorConfig:
    """Settings of every generator."""

    name: str = setting("hybrid", "generator")
    parameters: int | None = setting(
        None, "trainable parameters at most; if given, the generator's width is chosen to meet it", minimum=1000
    )


@dataclass
class LearnedGeneratorConfig(GeneratorConfig):
    """Settings of every generator that is trained on pairs."""

    noise_range: list[float] | None = setting(
        None,
        "lowest and highest noise of leaks, relative to the root mean square of their entries; the generator then sees "
        "how noisy each leak is, and linear starts are fitted level by level, about one for each power of ten; lowest "
        "0: leaks without noise, too (hybrid fits weights from them); for whole gradients of one image; []: none; "
        "null: that of a channel that is one gaussian_noise with lowest_std, or none",
    )


@dataclass
class MLPGeneratorConfig(LearnedGeneratorConfig):
    """LTI: one multilayer perceptron."""

    name: str = setting("mlp", "generator")
    hidden_size: int = setting(3000, "units of each hidden layer", minimum=1)
    hidden_layers: int = setting(2, "number of hidden layers", minimum=1)
    scale_inputs: bool = setting(True, "scale gradients by their size and standardise them; LTI as published does not")


@dataclass
class CoarseGeneratorConfig(LearnedGeneratorConfig):
    """Coarse-GIT: one learned step per module."""

    name: str = setting("coarse", "generator")
    hidden_size: int = setting(1000, "hidden units of each module's network", minimum=1)
    modules: list[str] | None = setting(
        None,
        "patterns (with * and ?) over the leaked model's layers: neighbours that one pattern fits are one module; "
        "null: a module for each layer, residual block or attention block",
    )
    averages: bool = setting(True, "let each step see the δ-weighted averages of its layers' inputs")
    linear_start_features: int = setting(
        6144,
        "most averages that a closed-form linear regression uses, whose image the steps correct (its cost grows with "
        "the cube, and for large images they are fewer); 0: the steps make the image alone",
        minimum=0,
    )
    mirrored_start: bool = setting(
        True, "fit the regression on mirrored images, too, where data.horizontal_flip mirrors those that it trains on"
    )
    channels: int = setting(32, "maps that a step makes large estimates of", minimum=1)


@dataclass
class HybridGeneratorConfig(LearnedGeneratorConfig):
    """Hybrid-GIT: closed form, then a trained refinement."""

    exact_depth: int | None = setting(
        None, "layers to invert in closed form, from the output down; null: as many as have a rule", minimum=1
    )
    noise: float | None = setting(
        None,
        "standard deviation of gradient errors over the root mean square of a leak's entries; null: estimated per leak",
        minimum=0,
    )
    mirrored_start: bool = setting(
        True, "fit the linear start on mirrored images, too, where data.horizontal_flip mirrors those that it trains on"
    )
    forward_equations: bool = setting(
        False,
        "use forward equations and a prior in the closed form, too, as exact does: reaches as far, at about a second a "
        "leak on two cores, in training as well",
    )
    separate: bool | None = setting(
        None,
        "tell the images of a client batch apart by the last layer's equations, whose weights follow from gradients of "
        "single images; null: where they are fewer than classes, and each leak takes milliseconds",
    )
    weights_from: str | None = setting(
        None,
        "run folder of generator.name=exact whose fitted weights forward_equations takes, where the pairs of this run "
        "are too noisy to fit any; null: fitted from this run's pairs",
    )
    channels: int = setting(64, "channels of the convolutional refinement", minimum=1)
    blocks: int = setting(3, "residual blocks of the refinement", minimum=0)
    gradient_channels: int = setting(8, "feature maps learned from all gradients that no rule explains", minimum=0)
    gradient_entries: int = setting(
        16384, "entries of these gradients at most: the smallest parameters' that together have no more", minimum=0
    )
    gradient_hidden_size: int = setting(
        1024,
        "hidden units between these gradients and their maps, where a layer without them would be larger",
        minimum=1,
    )
    averages: bool = setting(True, "use the δ-weighted averages of the inputs of layers that no rule explains")
    averages_of_inverted_layers: bool | None = setting(
        None,
        "use those of layers that the closed form inverts, too, and choose how much it and they count; "
        "null: where a channel, or of one image several local steps, change the leaks",
    )
    linear_start_features: int = setting(
        6144,
        "most features that the closed-form linear start uses (its cost grows with the cube); with large images fewer, "
        "so that it has at most 134 million coefficients",
        minimum=1,
    )
    local_start: bool | None = setting(
        None,
        "fit a second linear start, from neighbourhoods in the deepest feature maps that are exact, the same at all "
        "positions, and take whichever errs less; of one image per leak; null: yes, where there are such maps",
    )
    closed_form_alone: bool | None = setting(
        None,
        "where the closed form reaches the image, leave it at that and train nothing; null: unless a channel or "
        "several local steps change the leaks, of which its equations do not hold",
    )


@dataclass
class ExactGeneratorConfig(GeneratorConfig):
    """Exact-GIT: the equations of back-propagation, with estimated weights."""

    name: str = setting("exact", "generator")
    fit: str = setting(
        "layerwise",
        "the leaked weights: layerwise: closed form from pairs; descent: trained",
        choices=["layerwise", "descent"],
    )
    objective: str = setting(
        "layers",
        "what descent minimises: layers: the residuals of every layer's equations (use optimizer.name=sgd, "
        "optimizer.momentum=0, a learning rate of nearly one); image: the image's squared error alone, as in the paper",
        choices=["layers", "image"],
    )
    start: str | None = setting(
        None,
        "weights that descent and gradient matching start from: layerwise (fit them first), or a run's folder or "
        "checkpoint; null: none",
    )
    noise: float | None = setting(
        None,
        "standard deviation of gradient errors over the root mean square of a leak's entries; null: estimated per leak",
        minimum=0,
    )
    damping: float = setting(
        1e-3,
        "descent, objective image: Tikhonov damping of each solve, over the mean diagonal of its normal matrix",
        above=0,
    )
    matching_epochs: int = setting(
        20, "layerwise: passes of gradient matching for weights that no closed form reaches", minimum=1
    )
    ridge_features: int = setting(
        6144, "most activations that a regression stands on where the equations do not reach the image", minimum=1
    )
