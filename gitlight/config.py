"""Every setting of gitlight, once: its name, type, default, unit and meaning.

`gitlight.config_loading` reads YAML files and command-line overrides into these classes. A named component (a
generator, a leaked model, a channel stage) has a class of its own, chosen by its ``name``, and registered with it.
"""

from dataclasses import dataclass, field, fields
from typing import Any


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its documentation and limits.

    Args:
        default: the default value; a list or mapping becomes a default factory.
        help: one line: meaning and unit.
        **limits: any of ``choices`` (allowed values), ``minimum``, ``above`` (exclusive minimum), ``maximum``.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def redefined(owner: type, name: str, default: Any) -> Any:
    """A setting of ``owner``, meaning and limits as they are there, with another default."""
    (inherited,) = (one for one in fields(owner) if one.name == name)
    return field(default=default, metadata=inherited.metadata)


@dataclass
class DataConfig:
    """Which images, and how they are shared out."""

    name: str = setting("photos", "image source")
    root: str | None = setting(None, "folder that holds the images; not needed for photos and faces")
    download: bool = setting(False, "let torchvision download the set into data.root")
    image_size: int = setting(32, "height and width of the images, in pixels", minimum=8, maximum=4096)
    channels: int = setting(3, "3: colour (grey images are repeated); 1: grey (colour is converted)", choices=[1, 3])
    client_batch_size: int = setting(1, "images whose averaged gradient is one leak", minimum=1)
    n_public_images: int | None = setting(None, "images of the training split to use; null: all", minimum=2)
    n_validation: int = setting(
        256, "images to choose the best checkpoint by: of the above, unless the source has its own", minimum=1
    )
    public_classes: list[str] | None = setting(None, "classes that pairs are made from; null: all")
    private_classes: list[str] | None = setting(None, "classes of the attacked images; null: all")
    batch_size: int = setting(128, "leaks in one optimiser step, summed over all devices", minimum=1)
    num_workers: int | None = setting(
        None, "processes that read images, per device; null: none for sets held in memory, else one per core", minimum=0
    )
    memory_limit_gb: float = setting(2.0, "decoded image sets up to this size are held in memory, in GB", minimum=0)
    horizontal_flip: bool = setting(False, "mirror each public image at random, afresh in every epoch")


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
        "by torch.compile, which takes from seconds to minutes first",
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
        "learns the whole range; null: relative_std for all",
        minimum=1e-12,
    )


@dataclass
class PruningConfig(ChannelConfig):
    """Sparsification of the gradient."""

    name: str = setting("pruning", "channel stage")
    fraction: float = setting(0.9, "share of each tensor's entries, the smallest, set to zero", minimum=0, maximum=1)


@dataclass
class GeneratorConfig:
    """Settings of every generator."""

    name: str = setting("hybrid", "generator")
    parameters: int | None = setting(
        None, "trainable parameters at most; if given, the generator's width is chosen to meet it", minimum=1000
    )


@dataclass
class MLPGeneratorConfig(GeneratorConfig):
    """LTI: one multilayer perceptron."""

    name: str = setting("mlp", "generator")
    hidden_size: int = setting(3000, "units of each hidden layer", minimum=1)
    hidden_layers: int = setting(2, "number of hidden layers", minimum=1)
    scale_inputs: bool = setting(True, "scale gradients by their size and standardise them; LTI as published does not")


@dataclass
class CoarseGeneratorConfig(GeneratorConfig):
    """Coarse-GIT: one learned step per module."""

    name: str = setting("coarse", "generator")
    hidden_size: int = setting(1000, "hidden units of each module's network", minimum=1)
    modules: list[str] | None = setting(
        None,
        "patterns (with * and ?) over the leaked model's layers: neighbours that one pattern fits are one module; "
        "null: a module for each layer, residual block or attention block",
    )
    averages: bool = setting(True, "let each step see the δ-weighted averages of its layers' inputs")
    channels: int = setting(32, "maps that a step makes large estimates of", minimum=1)


@dataclass
class HybridGeneratorConfig(GeneratorConfig):
    """Hybrid-GIT: closed form, then a trained refinement."""

    exact_depth: int | None = setting(
        None, "layers to invert in closed form, from the output down; null: as many as have a rule", minimum=1
    )
    noise: float | None = setting(
        None,
        "standard deviation of gradient errors over the root mean square of a leak's entries; null: estimated per leak",
        minimum=0,
    )
    forward_equations: bool = setting(
        False,
        "use forward equations and a prior in the closed form, too, as exact does: reaches as far, at about a second a "
        "leak on two cores, in training as well",
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
    linear_start_features: int = setting(
        6144, "most features that the closed-form linear start uses (its cost grows with the cube)", minimum=1
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


@dataclass
class AttackConfig:
    """What ``evaluate.py`` attacks with: by itself, the trained generator's one forward pass."""

    name: str = setting("generator", "attack")


@dataclass
class MatchingConfig(AttackConfig):
    """An iterative attack: the image whose gradient is nearest to the one that leaked."""

    name: str = setting("ig", "attack")
    knowledge: str = setting(
        "parameters",
        "the weights that gradients are computed with: parameters: the leaked model's own, as in the literature; "
        "recovered: those that generator.name=exact identified from pairs (attack.recovered_from)",
        choices=["parameters", "recovered"],
    )
    recovered_from: str | None = setting(
        None, "run folder of generator.name=exact whose weights attack.knowledge=recovered takes; null: this run's own"
    )
    prior: str | None = setting(
        None,
        "what the search starts from: the run folder of a trained generator, an image file, or gray; null: noise",
    )
    prior_weight: float = setting(
        0.0, "weight of the mean squared distance to the prior, at the start; falls to zero along a cosine", minimum=0
    )
    labels: str = setting(
        "recovered",
        "given: the attacker knows them; recovered: read off the last layer's gradient; optimised: searched for with "
        "the image",
        choices=["given", "recovered", "optimised"],
    )
    iterations: int = setting(4800, "steps of the optimiser at most", minimum=1)
    objective: str = setting(
        "cosine", "distance of gradients: one minus their cosine, or the squared Euclidean", choices=["cosine", "l2"]
    )
    layer_weights: str = setting(
        "equal",
        "what each parameter's part of the distance counts: equal; linear: from 1 at the image to 2 at the output; "
        "size: the inverse of its squared norm in the leak, over all parameters' mean",
        choices=["equal", "linear", "size"],
    )
    total_variation: float = setting(0.1, "weight of the mean absolute difference of neighbouring pixels", minimum=0)
    batch_norm_statistics: float = setting(
        0.0, "weight of the distance between the images' batch norm statistics and the running ones", minimum=0
    )
    box: bool = setting(True, "keep pixels in [0, 1] after every step")
    optimizer: str = setting(
        "signed_adam", "optimiser; signed_adam: Adam on the signs", choices=["lbfgs", "adam", "signed_adam"]
    )
    step_size: float = setting(0.1, "step size, in pixel values; 1 for lbfgs", above=0)
    decay: str = setting(
        "step",
        "of the step size: constant; step: tenfold at 3/8, 5/8 and 7/8 of the iterations; cosine to zero",
        choices=["constant", "step", "cosine"],
    )
    restarts: int = setting(1, "searches from different noise, of which the nearest counts", minimum=1)
    tolerance: float = setting(
        1e-9,
        "a search ends when the squared distance over the squared norm of the leak (l2), or one minus the cosine, is "
        "below this",
        minimum=0,
    )
    dtype: str = setting("float32", "precision of the search", choices=["float32", "float64"])
    memory_limit_gb: float = setting(2.0, "memory for the searches that run at once, in GB", above=0)
    record_every: int = setting(50, "iterations between points of the trajectories", minimum=1)


@dataclass
class DLGConfig(MatchingConfig):
    """DLG (Zhu et al. 2019): Euclidean distance, L-BFGS, noise, labels searched for."""

    name: str = setting("dlg", "attack")
    labels: str = redefined(MatchingConfig, "labels", "optimised")
    iterations: int = redefined(MatchingConfig, "iterations", 1200)
    objective: str = redefined(MatchingConfig, "objective", "l2")
    total_variation: float = redefined(MatchingConfig, "total_variation", 0.0)
    box: bool = redefined(MatchingConfig, "box", False)
    optimizer: str = redefined(MatchingConfig, "optimizer", "lbfgs")
    step_size: float = redefined(MatchingConfig, "step_size", 1.0)
    decay: str = redefined(MatchingConfig, "decay", "constant")
    dtype: str = redefined(MatchingConfig, "dtype", "float64")


@dataclass
class IDLGConfig(DLGConfig):
    """iDLG (Zhao et al. 2020): DLG with the label read off the gradient."""

    name: str = setting("idlg", "attack")
    labels: str = redefined(MatchingConfig, "labels", "recovered")


@dataclass
class GradInversionConfig(MatchingConfig):
    """After GradInversion (Yin et al. 2021): batch norm statistics as a regulariser, for client batches."""

    name: str = setting("gradinversion", "attack")
    objective: str = redefined(MatchingConfig, "objective", "l2")
    layer_weights: str = redefined(MatchingConfig, "layer_weights", "size")
    total_variation: float = redefined(MatchingConfig, "total_variation", 0.01)
    batch_norm_statistics: float = redefined(MatchingConfig, "batch_norm_statistics", 0.01)
    optimizer: str = redefined(MatchingConfig, "optimizer", "adam")
    decay: str = redefined(MatchingConfig, "decay", "cosine")


@dataclass
class OptimizerConfig:
    """How weights are trained."""

    name: str = setting("adam", "optimiser", choices=["adam", "adamw", "sgd"])
    learning_rate: float = setting(1e-3, "peak learning rate", above=0)
    momentum: float = setting(0.9, "momentum; sgd only", minimum=0, maximum=1)
    weight_decay: float = setting(0.0, "weight decay", minimum=0)
    schedule: str = setting(
        "cosine",
        "learning rate over the run: constant, cosine to zero, or step (tenfold down at 75 %)",
        choices=["constant", "cosine", "step"],
    )
    warmup_fraction: float = setting(0.02, "share of the run over which the rate rises from zero", minimum=0, maximum=1)


@dataclass
class TrainerConfig:
    """Lightning's own names (`lightning.Trainer`), and `resume`."""

    accelerator: str = setting("auto", "auto, cpu, gpu; not mps, which has no float64")
    devices: Any = setting("auto", "number of devices, list of device indices, or auto")
    num_nodes: int = setting(1, "number of machines", minimum=1)
    strategy: str = setting("auto", "auto, ddp, fsdp, …")
    precision: str = setting(
        "32-true",
        "precision of trained layers; closed forms are float64 throughout",
        choices=["32-true", "bf16-mixed", "16-mixed"],
    )
    max_epochs: int = setting(10, "passes over the public images", minimum=1)
    max_steps: int = setting(-1, "optimiser steps at most; -1: no limit", minimum=-1)
    max_time: str | None = setting(None, "training time at most, as DD:HH:MM:SS")
    limit_train_batches: Any = setting(None, "batches (int) or share (float) of an epoch; null: all")
    limit_val_batches: Any = setting(None, "batches (int) or share (float) of the validation set; null: all")
    check_val_every_n_epoch: int = setting(1, "epochs between validations", minimum=1)
    log_every_n_steps: int = setting(10, "steps between logged training losses", minimum=1)
    gradient_clip_val: float | None = setting(None, "largest norm of the generator's own gradient", minimum=0)
    accumulate_grad_batches: int = setting(1, "batches summed into one optimiser step", minimum=1)
    deterministic: bool = setting(False, "only deterministic algorithms, an error where there is none")
    detect_anomaly: bool = setting(False, "stop at the operation that made a NaN (slow)")
    profiler: str | None = setting(None, "simple, advanced or pytorch")
    resume: str | None = setting(None, "continue a run: last, best, or a checkpoint's path")


@dataclass
class EvaluationConfig:
    """How a trained generator is measured."""

    n_images: int = setting(1000, "private images to attack; fewer where the test split has fewer", minimum=1)
    checkpoint: str = setting("best", "which checkpoint to evaluate", choices=["best", "last"])
    bootstrap_samples: int = setting(2000, "resamplings of the images for the 95 % intervals", minimum=100)
    n_pictures: int = setting(16, "reconstructions drawn in pictures", minimum=1)


@dataclass
class LoggingConfig:
    """Where a run reports to."""

    wandb: str = setting(
        "auto", "auto: online where an API key is set, else offline", choices=["auto", "online", "offline", "off"]
    )
    project: str = setting("gitlight", "W&B project")
    quiet: bool = setting(False, "no progress bar: one line an epoch, for log files")


@dataclass
class Config:
    """The root: one run."""

    task: str = setting("generator", "train a generator, or a leaked model", choices=["generator", "leaked"])
    seed: int = setting(0, "seed of everything random but the leaked model's weights", minimum=0, maximum=2**32 - 1)
    output_dir: str | None = setting(None, "folder that the run writes; null: runs/NAME, NAME that of the config file")
    data: DataConfig = field(default_factory=DataConfig)
    leaked: LeakedConfig = field(default_factory=LeNetConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    channel: list[Any] = setting([], "stages that gradients pass on their way to the attacker, in order")
    generator: GeneratorConfig = field(default_factory=HybridGeneratorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
