"""Every setting of gitlight, once: its name, type, default, unit and meaning.

`gitlight.config_loading` reads YAML files and command-line overrides into these classes. A named component (a
generator, a leaked model, a channel stage) has a class of its own, chosen by its ``name``, and registered with it.
"""

from dataclasses import dataclass, field
from typing import Any

from gitlight.config.attacks import AttackConfig, DLGConfig, GIASConfig, GradInversionConfig, IDLGConfig, MatchingConfig
from gitlight.config.data import DataConfig
from gitlight.config.fields import redefined, setting
from gitlight.config.generators import (
    CoarseGeneratorConfig,
    ExactGeneratorConfig,
    GeneratorConfig,
    HybridGeneratorConfig,
    LearnedGeneratorConfig,
    MLPGeneratorConfig,
)
from gitlight.config.gradients import (
    ChannelConfig,
    GaussianNoiseConfig,
    GradientsConfig,
    PruningConfig,
    SketchConfig,
    UpdatesConfig,
)
from gitlight.config.leaked import (
    CustomConfig,
    FullyConnectedConfig,
    GivenConfig,
    LeakedConfig,
    LeNetConfig,
    ResNet18Config,
    ResNetConfig,
    TorchvisionResNet18Config,
    TorchvisionResNet50Config,
    ViTB16Config,
    ViTConfig,
)
from gitlight.config.run import (
    EvaluationConfig,
    ImagePriorConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainerConfig,
)

__all__ = [
    "AttackConfig",
    "ChannelConfig",
    "CoarseGeneratorConfig",
    "Config",
    "CustomConfig",
    "DLGConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExactGeneratorConfig",
    "FullyConnectedConfig",
    "GIASConfig",
    "GaussianNoiseConfig",
    "GeneratorConfig",
    "GivenConfig",
    "GradInversionConfig",
    "GradientsConfig",
    "HybridGeneratorConfig",
    "IDLGConfig",
    "ImagePriorConfig",
    "LeNetConfig",
    "LeakedConfig",
    "LearnedGeneratorConfig",
    "LoggingConfig",
    "LossConfig",
    "MLPGeneratorConfig",
    "MatchingConfig",
    "OptimizerConfig",
    "PruningConfig",
    "ResNet18Config",
    "ResNetConfig",
    "SketchConfig",
    "TorchvisionResNet18Config",
    "TorchvisionResNet50Config",
    "TrainerConfig",
    "UpdatesConfig",
    "ViTB16Config",
    "ViTConfig",
    "redefined",
    "setting",
]


@dataclass
class Config:
    """The root: one run."""

    task: str = setting(
        "generator",
        "train a generator, a leaked model, or an image prior for attack=gias",
        choices=["generator", "leaked", "image_prior"],
    )
    seed: int = setting(0, "seed of everything random but the leaked model's weights", minimum=0, maximum=2**32 - 1)
    output_dir: str | None = setting(
        None, "folder that the run writes, ~ is your home; null: runs/NAME, NAME that of the config file"
    )
    data: DataConfig = field(default_factory=DataConfig)
    leaked: LeakedConfig = field(default_factory=LeNetConfig)
    gradients: GradientsConfig = field(default_factory=GradientsConfig)
    channel: list[Any] = setting([], "stages that gradients pass on their way to the attacker, in order")
    generator: GeneratorConfig = field(default_factory=HybridGeneratorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    image_prior: ImagePriorConfig = field(default_factory=ImagePriorConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
