"""`LeakedModel`: the model whose gradients leak."""

import hashlib
import logging
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gitlight.architecture import Architecture, ImageShape
from gitlight.config import LeakedConfig, OptimizerConfig
from gitlight.errors import ArchitectureError
from gitlight.exported import copied, draws_random_numbers, without_hooks
from gitlight.leaked import LEAKED_MODELS
from gitlight.leaked.batch_norm import check_replaced, use_batch_statistics
from gitlight.leaked.custom import given
from gitlight.leaked.normalisation import replace_normalize
from gitlight.leaked.weights import load_weights
from gitlight.optimization import configure_optimizer
from gitlight.sharding import ShardableModule

log = logging.getLogger(__name__)


class LeakedModel(ShardableModule):
    """A classifier, frozen unless it is being trained with ``train.py task=leaked``.

    Attributes:
        network: images ``(B, C, H, W)`` in [0, 1] to logits ``(B, n_classes)``.
        architecture: the network's structure, without its weights.
    """

    def __init__(
        self,
        settings: LeakedConfig,
        image_shape: ImageShape,
        n_classes: int,
        optimizer: OptimizerConfig | None = None,
        network: nn.Module | None = None,
    ) -> None:
        """Build the network, initialise it from ``leaked.seed``, and load ``leaked.weights`` if given.

        Args:
            settings: name, activation, initialisation, weights, batch norm.
            image_shape: ``(C, H, W)``.
            n_classes: number of labels.
            optimizer: how to train it; None leaves it frozen.
            network: a model of the user's own, which is copied, instead of one that ``settings.name`` builds.

        Raises:
            CheckpointError: ``leaked.weights`` is missing, unreadable, of another architecture, or holds numbers that
                are not finite.
            ArchitectureError: the network has no parameters, cannot be traced, does not put out one row of
                ``n_classes`` logits per image, or draws random numbers in evaluation mode.
            ConfigError: settings that the network cannot have, as batch statistics without batch norm.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network: nn.Module = (
                LEAKED_MODELS[settings.name].load()(settings, image_shape, n_classes)
                if network is None
                else given(settings, network)
            )
            replace_normalize(self.network)
            if settings.init == "uniform":
                for parameter in self.network.parameters():
                    nn.init.uniform_(parameter, -settings.init_range, settings.init_range)
        if settings.weights is not None:
            load_weights(self.network, Path(settings.weights))
        # A model in training has the statistics of its batches anyway, and keeps running ones for later.
        if replaces := settings.batch_norm == "batch" and optimizer is None:
            use_batch_statistics(self.network)
        self.architecture = Architecture.of(self.network, image_shape, n_classes)
        if replaces:
            check_replaced(self.architecture)
        if not self.architecture.parameter_shapes:
            raise ArchitectureError(f"{type(self.network).__name__} has no parameters, so no gradient leaks.")
        _check_logits(self.architecture, type(self.network).__name__)
        _check_not_random(self.architecture)
        # Lightning's own epoch mean rounds the ranks' batch counts, which is wrong for shares of unequal size.
        self.val_loss, self.val_accuracy = MeanMetric(), MeanMetric()
        self._optimizer = optimizer
        if optimizer is None:
            _warn_of_zeros(self.network, self.architecture)
            _warn_of_hooks(self.network, image_shape)
            self.freeze()

    @property
    def sharded(self) -> nn.Module:
        """The network."""
        return self.network

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to logits ``(B, n_classes)``."""
        logits: Tensor = self.network(images)
        return logits

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, unless the model is frozen: that one stays in evaluation mode.

        In training mode batch norm would average over the images of a leak, and change its running statistics: the
        leaked model would be another one after each leak.
        """
        return super().train(mode and self._optimizer is not None)

    def fingerprint(self) -> str:
        """A hash of all weights: two leaked models with equal fingerprints are the same model."""
        digest = hashlib.sha256()
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of one batch of ``(images, labels, indices)``."""
        loss, accuracy = self._loss_and_accuracy(batch)
        values = {"train/loss": loss, "train/accuracy": accuracy}
        self.log_dict(values, on_step=True, on_epoch=False, prog_bar=True, sync_dist=True, batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on held-out public images."""
        loss, accuracy = self._loss_and_accuracy(batch)
        if self.is_waited_for(batch_idx):
            self(batch[0])
        self.val_loss.update(loss, weight=len(batch[1]))
        self.val_accuracy.update(accuracy, weight=len(batch[1]))
        values = {"val/loss": self.val_loss, "val/accuracy": self.val_accuracy}
        self.log_dict(values, on_epoch=True, prog_bar=True, batch_size=len(batch[1]))

    def _loss_and_accuracy(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels, _ = batch
        logits = self(images)
        return nn.functional.cross_entropy(logits, labels), (logits.argmax(dim=1) == labels).float().mean()

    def configure_optimizers(self) -> Any:
        """The optimiser and schedule of the config."""
        assert self._optimizer is not None, "a frozen leaked model is not trained"
        return configure_optimizer(self, self._optimizer)


def _check_logits(architecture: Architecture, name: str) -> None:
    """Raises: ArchitectureError, if the output is not one row of as many logits as there are classes."""
    last = architecture[architecture.output]
    found = last.output_shape
    if last.operation is torch.ops.aten.squeeze.default:
        raise ArchitectureError(
            f"{name} ends in a squeeze of all dimensions, which of a single image drops the batch dimension: "
            f"the leaked model must map (B, C, H, W) to logits (B, {architecture.n_classes}). Use flatten(1)."
        )
    if found != (architecture.n_classes,):
        raise ArchitectureError(
            f"{name} puts out {'×'.join(map(str, found)) or 'no'} values per image, and the images have "
            f"{architecture.n_classes} classes: the leaked model must map (B, C, H, W) to logits "
            f"(B, {architecture.n_classes})."
        )


def _warn_of_zeros(network: nn.Module, architecture: Architecture) -> None:
    """Say that nothing but the last layer leaks, where that has no weights to carry a gradient back with."""
    name = architecture[architecture.output].parameters.get("weight")
    if name is not None and not network.get_parameter(name).any():
        log.warning(
            "%s of the leaked model's last layer is all zeros, as torchvision starts its vision transformers: the "
            "gradients of all other parameters are zero, and tell nothing of the images. Give trained weights "
            "(leaked.weights), or initialise it.",
            name,
        )


def _warn_of_hooks(network: nn.Module, image_shape: ImageShape) -> None:
    """Say that closed forms invert another model, where a user's hooks change values: no graph holds what they do."""
    hooked = [path or "itself" for path, m in network.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if not hooked:
        return
    like = next(network.parameters())
    image = torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(0)).to(like)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        with_them, without = copied(network).eval()(image), without_hooks(copied(network)).eval()(image)
    if not torch.equal(with_them, without):
        log.warning(
            "Hooks of the leaked model's modules change what it puts out (hooks of %s). Its gradients have that, and "
            "its architecture has not: exact, and the closed form of hybrid, invert the model without them, which is "
            "another. Compute in forward what hooks compute.",
            ", ".join(hooked),
        )


def _check_not_random(architecture: Architecture) -> None:
    """Raises: ArchitectureError, if it draws random numbers in evaluation mode, so that no two gradients are alike."""
    for layer in architecture.layers:
        if not draws_random_numbers(layer.operation, layer.arguments):
            continue
        if "dropout" in layer.kind or layer.arguments.get("dropout_p"):
            raise ArchitectureError(
                f"{layer.place} of the leaked model drops values at random in evaluation mode, too. Use "
                "torch.nn.Dropout, or pass training=self.training to torch.nn.functional.dropout."
            )
        raise ArchitectureError(
            f"{layer.place} of the leaked model draws random numbers in evaluation mode, too: no two gradients of an "
            "image would be alike. Draw them only if self.training, or pass training=self.training where the function "
            "takes it."
        )
