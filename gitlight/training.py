"""`GITModule`, the LightningModule around a generator, and `train`, what ``train.py`` does."""

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gitlight.architecture import Architecture
from gitlight.attacks.image_prior import ImagePrior, ImagesAlone
from gitlight.callbacks.run_settings import check_remaining, check_resumable
from gitlight.compatibility import (
    check_averaging,
    check_clipping,
    check_loss,
    check_perceptual,
    check_virtual_ranks,
    check_weights_from,
)
from gitlight.config import Config, LossConfig, OptimizerConfig
from gitlight.data.datamodule import ImageDataModule, image_shape, load_images
from gitlight.data.pair import GradientPair, Gradients
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.decisions import with_decisions
from gitlight.errors import CheckpointError, ConfigError, LostRankError, misfit
from gitlight.fitting import fit_in_closed_form
from gitlight.generators import GENERATORS
from gitlight.generators.base import Generator
from gitlight.gradients.updates import describe_leak
from gitlight.leaked.custom import with_network
from gitlight.leaked.model import LeakedModel
from gitlight.metrics import match
from gitlight.optimization import configure_optimizer
from gitlight.perceptual import perceptual_term
from gitlight.rank_watch import RankWatch
from gitlight.report.attacked import FAILURE
from gitlight.runs import (
    WANDB_ID,
    check_run_folder,
    checkpoint_to_resume,
    load_checkpoint,
    prepare_run_folder,
    previous_hint,
    run_folder,
    run_lock,
)
from gitlight.sharding import ShardableModule, check_shardable
from gitlight.speed import speed_up
from gitlight.stop_signals import StopSignals
from gitlight.sweep.trial import end_with_the_sweep
from gitlight.trainer import build_trainer, trainer_settings
from gitlight.virtual_ranks import DividedBatch, add_up, mean_loss, n_processes

log = logging.getLogger(__name__)


class GITModule(ShardableModule):
    """Trains a generator on pairs: closed-form fits first, then descent on the mean squared error, or its own loss.

    A perceptual term may come on top of the squared error (`gitlight.perceptual`). With several images per leak the
    loss is that of the assignment of outputs to images with the least squared error (Wu et al. 2023). Metrics and
    pictures are callbacks'.
    """

    forward_methods = ("training_loss",)
    large_layers_apart = True
    in_pairs = False
    """Whether sums over processes are made in pairs (`gitlight.virtual_ranks`)."""

    def __init__(self, generator: Generator, optimizer: OptimizerConfig, loss: LossConfig | None = None) -> None:
        """Args: what is trained, how, and on what; None: the squared error alone.

        Raises:
            ConfigError: the images are not fit for the perceptual term, or its network's weights are missing.
        """
        super().__init__()
        self.generator = generator
        self._loss_settings = loss or LossConfig()
        name = self._loss_settings.perceptual
        # A function, not a module: its network is neither trained nor kept in checkpoints.
        self._perceptual = None if name is None else perceptual_term(name, generator.architecture.image_shape)
        # Lightning's own epoch mean rounds the ranks' batch counts, which is wrong for shares of unequal size.
        self.val_loss = MeanMetric()
        self._optimizer = optimizer
        # Closed-form coefficients are tens of megabytes of buffers, sent to all ranks once after the fits. Without this
        # DistributedDataParallel would send them at every step (the name is the one that it looks for).
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def forward(self, gradients: Gradients) -> Tensor:
        """Gradients ``(B, …)`` to images ``(B, N, C, H, W)`` in [0, 1]."""
        images: Tensor = self.generator(gradients)
        return images

    @property
    def sharded(self) -> nn.Module:
        """The generator; its closed-form parts are buffers, and whole on every device."""
        return self.generator

    def on_fit_start(self) -> None:
        """Make the generator's closed-form fits, unless a resumed checkpoint holds them already."""
        if bool(self.generator.fitted):
            return
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, GradientPairDataModule)
        fit_in_closed_form(self.generator, datamodule, self.device)

    def training_step(self, batch: GradientPair | DividedBatch, batch_idx: int) -> Tensor | None:
        """The batch's loss, or the generator's own; None for one with nothing to train."""
        trained = {name: value for name, value in self.generator.named_parameters() if value.requires_grad}
        if not trained:
            return None
        if self.generator.couples_leaks:
            pairs = map(batch.make, batch.parts) if isinstance(batch, DividedBatch) else [batch]
            loss = self.generator.coupled_loss([(pair.gradients, pair.images) for pair in pairs])
        elif isinstance(batch, DividedBatch):
            loss = mean_loss([partial(self._loss_of_part, batch, part) for part in batch.parts], trained)
        else:
            loss = self._training_loss(batch)
        logged = add_up(loss.detach().clone(), in_pairs=self.in_pairs) / n_processes()
        self.log("train/loss", logged, on_step=True, on_epoch=False, prog_bar=True, batch_size=len(batch))
        return loss

    def _loss_of_part(self, batch: DividedBatch, part: Any) -> Tensor:
        return self._training_loss(batch.make(part))  # pairs that are gone when the next part's are made

    def _training_loss(self, pair: GradientPair) -> Tensor:
        if self.generator.has_own_loss:
            return self.generator.training_loss(pair.gradients, pair.images)
        return self._loss(self(pair.gradients), pair)

    def validation_step(self, pair: GradientPair, batch_idx: int) -> dict[str, Tensor]:
        """Log the loss on held-out public pairs and hand the reconstructions to the callbacks."""
        reconstructions = self(pair.gradients)
        if self.is_waited_for(batch_idx):
            self(pair.gradients)
        loss = self._loss(reconstructions, pair)
        if self.generator.refuses:
            # A failure, as in ``val/mse``: left out, the checkpoint that refuses most would have the least loss.
            refused = 1 - torch.isfinite(reconstructions).flatten(1).all(dim=1).double().mean()
            loss = (1 - refused) * loss + refused * FAILURE["mse"]
        self.val_loss.update(loss, weight=len(pair))
        self.log("val/loss", self.val_loss, on_epoch=True, batch_size=len(pair))
        return {"reconstructions": reconstructions}

    def _loss(self, reconstructions: Tensor, pair: GradientPair) -> Tensor:
        """Mean squared error, and the perceptual term in its weight."""
        matched, images = match(reconstructions, pair.images), pair.images
        if self.generator.refuses:
            answered = torch.isfinite(matched).flatten(1).all(dim=1)
            if not bool(answered.any()):
                # Connected to the parameters all the same: other ranks wait for this one's gradients.
                return sum((p.sum() * 0.0 for p in self.generator.parameters()), matched.new_zeros(()))
            matched, images = matched[answered], images[answered]
        loss = nn.functional.mse_loss(matched, images)
        if self._perceptual is not None:
            dtype = torch.promote_types(torch.promote_types(matched.dtype, images.dtype), torch.float32)
            with torch.autocast(images.device.type, enabled=False):
                distances = self._perceptual(matched.to(dtype).flatten(0, 1), images.to(dtype).flatten(0, 1))
            loss = loss + self._loss_settings.weight * distances.mean()
        return loss

    def configure_optimizers(self) -> Any:
        """The optimiser and schedule of the config."""
        return configure_optimizer(self, self._optimizer)


def build_generator(config: Config, architecture: Architecture) -> Generator:
    """The generator of a config, from an architecture alone, initialised from the run's seed.

    Raises:
        ConfigError: its settings do not fit the leak or the architecture.
        ArchitectureError: it cannot handle the architecture.
    """
    leak = describe_leak(config.gradients.updates, config.data.client_batch_size)
    component = GENERATORS[config.generator.name].load()
    if component.one_gradient and leak != "gradient":
        raise ConfigError(
            f"gradients.updates: {config.generator.name} inverts one gradient, and an update of several local steps, "
            f"{leak}, is not one. mlp, coarse and hybrid learn from updates (generator.name=mlp); for one step give "
            "gradients.updates.epochs=1 gradients.updates.batch_size=null."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = component(architecture, config.generator, config.data.client_batch_size)
    assert isinstance(generator, Generator)
    return generator


def build_pairs(config: Config, network: nn.Module | None = None) -> GradientPairDataModule:
    """The images and the leaked model of a config (or ``network``), and the data module that makes pairs of them."""
    images = load_images(config.data)
    leaked = LeakedModel(config.leaked, image_shape(config.data), len(images.class_names), network=network)
    return GradientPairDataModule(images, config.data, leaked, config.gradients, config.channel, config.seed)


def train(config: Config, network: nn.Module | None = None) -> Path:
    """Train what the config says (``task``: a generator, a leaked model, an image prior) and return the run's folder.

    The folder holds ``config.yaml``, ``checkpoints/``, ``metrics.csv``, ``wandb/`` and ``reconstructions/``. A run that
    was in it before is moved aside, unless ``trainer.resume`` continues it.

    Args:
        config: the run's settings.
        network: a leaked model of your own instead of the one that ``config.leaked`` names: any module from images
            ``(B, C, H, W)`` in [0, 1] to logits ``(B, n_classes)``. It is copied. ``config.yaml`` cannot hold it;
            `gitlight.evaluate` needs it again.

    Raises:
        GitlightError: the settings, the images or the checkpoint to resume from are not right, and nothing is trained;
            or a checkpoint cannot be written.
        RunStopped: SIGTERM, SIGUSR1 or SIGINT came; a checkpoint is written.
        LostRankError: another process of the run is gone.
    """
    end_with_the_sweep()  # train.py did, and programs of users need not know
    # Around everything: until there is something to save, a warning is to end the process with an error; and after a
    # stop hardly anything is left to do that another signal could end.
    with StopSignals() as signals, ExitStack() as held:
        config = with_decisions(with_network(config, network))
        check_loss(config)
        check_run_folder(config)
        if begun := (folder := run_folder(config)).exists():  # a checkpoint may be read, which another run may replace
            held.enter_context(run_lock(folder))
        _train(config, network, signals, None if begun else held)
    return folder


def _train(config: Config, network: nn.Module | None, signals: StopSignals, held: ExitStack | None) -> None:
    resume, folder = checkpoint_to_resume(config), run_folder(config)
    module: LightningModule
    datamodule: ImageDataModule
    if config.task == "leaked":
        images = load_images(config.data)
        shape, n_classes = image_shape(config.data), len(images.class_names)
        module = LeakedModel(config.leaked, shape, n_classes, optimizer=config.optimizer, network=network)
        datamodule = ImageDataModule(images, config.data, config.seed)
    elif config.task == "image_prior":
        module = ImagePrior(config.image_prior, image_shape(config.data), config.seed, config.optimizer)
        datamodule = ImagesAlone(load_images(config.data), config.data, config.seed)
    else:
        datamodule = build_pairs(config, network)
        check_weights_from(config, datamodule.leaked_model)
        generator = build_generator(config, datamodule.architecture)
        leak = describe_leak(config.gradients.updates, config.data.client_batch_size)
        if description := generator.describe(leak):
            log.info("%s", description)
        check_perceptual(config, generator)
        module = GITModule(generator, config.optimizer, config.loss)
        module.in_pairs = config.trainer.virtual_ranks is not None
    trained = module.generator if isinstance(module, GITModule) else module
    speed_up(trained, config.trainer)
    check_shardable(trained, config.trainer, config.optimizer)
    check_averaging(config, trained)
    check_clipping(config, trained)
    resumed = None if resume is None else _checked_checkpoint(resume, module, datamodule, config)
    settings, world_size = trainer_settings(config, not any(p.requires_grad for p in module.parameters()))
    check_virtual_ranks(config, trained, world_size)
    datamodule.virtual_ranks = config.trainer.virtual_ranks
    datamodule.check_shares(world_size, settings["limit_train_batches"], settings["limit_val_batches"])
    if resumed is not None and resume is not None and resume.resolve().parent.parent != folder.resolve():
        resumed[WANDB_ID] = None  # a run that begins where another one was is not that one
    if held is not None:  # a new run that was refused before leaves nothing, not even a lock
        held.enter_context(run_lock(folder))
    prepare_run_folder(config, resume)
    trainer = build_trainer(config, settings, world_size, folder, resume, resumed, signals)
    with RankWatch(trainer) as watch:
        try:
            trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
        except Exception as error:
            if lost := watch.explain(error):
                raise LostRankError(lost) from error
            raise


def _checked_checkpoint(
    path: Path, module: LightningModule, datamodule: ImageDataModule, config: Config
) -> dict[str, Any]:
    """What loggers need of a checkpoint, once it is sure to fit: before anything of the run is touched."""
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}.{previous_hint(path)}") from error
    check_resumable(path, checkpoint, config)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} is a checkpoint of a model of another shape than these settings give now: the images at data.root "
            f"have other classes, or gitlight another version. {misfit(error)}"
        ) from error
    check_remaining(path, checkpoint, config.trainer)
    if isinstance(datamodule, GradientPairDataModule):
        datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
    log.info("going on from %s, of step %d", path, checkpoint["global_step"])
    # Not all of it, which would keep the file on the disk when it has been replaced.
    return {key: checkpoint[key] for key in ("global_step", WANDB_ID)}
