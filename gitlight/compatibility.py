"""Settings that do not go with what they make a run train: one message, before anything of the run is touched."""

from pathlib import Path

from torch import nn

from gitlight.config import Config, ExactGeneratorConfig, LossConfig
from gitlight.config_loading import load_config
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.errors import CheckpointError, ConfigError
from gitlight.generators.base import Generator
from gitlight.leaked.model import LeakedModel
from gitlight.runs import checkpoint_path, load_checkpoint
from gitlight.trainer import accelerator


def check_averaging(config: Config, trained: nn.Module) -> None:
    """``optimizer.ema_decay`` averages weights that are trained, and whole."""
    if config.optimizer.ema_decay is None:
        return
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise ConfigError(
            f"optimizer.ema_decay: {config.generator.name} has no trained weights with these settings, to average. "
            "Leave it out."
        )
    if config.trainer.strategy == "fsdp":
        raise ConfigError(
            "optimizer.ema_decay: no average is kept of sharded weights. Leave it out, or give trainer.strategy=ddp."
        )


def check_clipping(config: Config, trained: nn.Module) -> None:
    """``trainer.gradient_clip_val`` clips the gradient of what is trained."""
    trains = any(parameter.requires_grad for parameter in trained.parameters())
    if config.trainer.gradient_clip_val is not None and not trains:
        raise ConfigError(
            f"trainer.gradient_clip_val: {config.generator.name} has no trained weights with these settings, whose "
            "gradient could be clipped. Leave it out."
        )


def check_loss(config: Config) -> None:
    """``loss`` is of generators, and its weight that of a term."""
    if config.loss.perceptual is None:
        if config.loss.weight != LossConfig().weight:
            raise ConfigError("loss.weight: there is no term to weigh. Give loss.perceptual, or leave it out.")
        return
    if config.task != "generator":
        raise ConfigError(f"loss.perceptual: task={config.task} has a loss of its own. Leave it out.")
    if config.loss.perceptual == "ssim" and config.trainer.deterministic and accelerator(config.trainer) != "cpu":
        raise ConfigError(
            "loss.perceptual: PyTorch has no deterministic backward pass for SSIM's padding on GPUs. Give "
            "loss.perceptual=gradient_difference, or leave trainer.deterministic out."
        )


def check_perceptual(config: Config, generator: Generator) -> None:
    """``loss.perceptual`` is a term beside the squared error of what is trained."""
    if config.loss.perceptual is None:
        return
    if generator.has_own_loss or not any(parameter.requires_grad for parameter in generator.parameters()):
        reason = "trains on a loss of its own" if generator.has_own_loss else "has nothing to train"
        raise ConfigError(
            f"loss.perceptual: with these settings {config.generator.name} {reason}, to which nothing is added. Leave "
            "it out."
        )


def check_virtual_ranks(config: Config, trained: nn.Module, world_size: int) -> None:
    """``trainer.virtual_ranks`` divides the steps of generators, equally among processes."""
    count, settings = config.trainer.virtual_ranks, config.trainer
    if count is None:
        return
    if config.task != "generator":
        raise ConfigError(f"trainer.virtual_ranks: task={config.task} does not divide its steps. Leave it out.")
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise ConfigError(
            f"trainer.virtual_ranks: {config.generator.name} has no trained weights with these settings, and runs in "
            "one process. Leave it out."
        )
    if count & (count - 1):
        raise ConfigError(f"trainer.virtual_ranks: {count} is not a power of two; give one, as 8.")
    if count % world_size:
        raise ConfigError(
            f"trainer.virtual_ranks: {count} cannot be shared equally by {world_size} processes. Give a power of two "
            "of processes, and at least as many virtual ranks."
        )
    if settings.strategy not in ("auto", "ddp"):
        raise ConfigError(
            f"trainer.virtual_ranks: trainer.strategy={settings.strategy} adds up gradients in an order of its own. "
            "Give trainer.strategy=ddp."
        )
    if settings.precision == "16-mixed":
        raise ConfigError(
            "trainer.virtual_ranks: the losses of virtual ranks are not scaled for 16-mixed. Give "
            "trainer.precision=bf16-mixed or 32-true."
        )
    if settings.accumulate_grad_batches > 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches: with trainer.virtual_ranks a batch is divided as it is. Raise "
            "data.batch_size and trainer.virtual_ranks instead: each part is made and differentiated by itself."
        )


def check_weights_from(config: Config, leaked_model: LeakedModel) -> None:
    """The run that ``generator.weights_from`` names must have fitted the weights of this leaked model."""
    named = getattr(config.generator, "weights_from", None)
    if named is None:
        return
    folder = Path(named)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"generator.weights_from: {named} is not a run's folder. Train configs/lenet_exact.yaml first."
        )
    fitted = load_config(folder)
    if not isinstance(fitted.generator, ExactGeneratorConfig) or fitted.generator.fit != "layerwise":
        raise ConfigError(
            f"generator.weights_from: {named} is a run of generator.name={fitted.generator.name}, and only exact with "
            "generator.fit=layerwise fits weights that forward equations can use."
        )
    checkpoint = load_checkpoint(checkpoint_path(folder, "last"))
    stored = checkpoint.get(GradientPairDataModule.__qualname__, {}).get("leaked_fingerprint")
    if stored != leaked_model.fingerprint():
        raise CheckpointError(
            f"generator.weights_from: {named} fitted another leaked model: its weights are not those that `leaked` "
            "gives now. Give a run with the same `leaked` settings."
        )
