"""`ImagePrior`: a variational autoencoder of public images that GIAS searches through (``task=image_prior``)."""

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gitlight.architecture import ImageShape
from gitlight.config import ImagePriorConfig, OptimizerConfig
from gitlight.config_loading import load_config
from gitlight.data.datamodule import ImageDataModule, image_shape
from gitlight.data.pair import GradientPair
from gitlight.data.sampling import mixed_seed
from gitlight.errors import CheckpointError, ConfigError, misfit
from gitlight.optimization import configure_optimizer
from gitlight.runs import available_checkpoint, checkpoint_path, load_checkpoint
from gitlight.sharding import ShardableModule

_SMALLEST = 4
"""Height and width of the decoder's first maps."""


class ImagesAlone(ImageDataModule):
    """Public images in the form that callbacks on reconstructions take: pairs without gradients, an image each."""

    def prepare(self, batch: Any, split: str, epoch: int) -> GradientPair:
        """What a step receives."""
        images, labels, indices = super().prepare(batch, split, epoch)
        return GradientPair({}, images.unsqueeze(1), labels.unsqueeze(1), indices.unsqueeze(1))


class ImagePrior(ShardableModule):
    """A variational autoencoder (Kingma and Welling 2014) whose pixel noise is learned (σ-VAE, Rybkin et al. 2021).

    Attributes:
        decoder: latents ``(N, latent size)`` to images ``(N, C, H, W)`` in [0, 1].
        latent_size: numbers that describe an image.
    """

    forward_methods = ("_loss",)

    def __init__(
        self, settings: ImagePriorConfig, image_shape: ImageShape, seed: int, optimizer: OptimizerConfig | None = None
    ) -> None:
        """Args: sizes; of images; the run's seed; how to train it (None: it is frozen).

        Raises:
            ConfigError: images of this size cannot be had by doubling maps of 4 × 4, or channels cannot be halved.
        """
        super().__init__()
        channels, height, width = image_shape
        doublings = round(math.log2(height / _SMALLEST)) if height >= _SMALLEST else -1
        if height != width or height != _SMALLEST * 2**doublings:
            raise ConfigError(
                f"data.image_size: {height}: an image prior makes images of 8, 16, 32, 64, … pixels: 4 times a power "
                "of two. Choose another size."
            )
        if settings.channels % 2**doublings:
            raise ConfigError(
                f"image_prior.channels: {settings.channels} cannot be halved {doublings} times, once for each doubling "
                f"of the image's size; give a multiple of {2**doublings}."
            )
        self.latent_size = settings.latent_size
        widths = [settings.channels // 2**level for level in range(doublings + 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = _decoder(settings.latent_size, widths, channels)
            self.encoder = _encoder(settings.latent_size, widths, channels)
        self.log_std = nn.Parameter(torch.tensor([-1.5]))  # FSDP takes no scalars
        self._seed, self._optimizer = seed, optimizer
        if optimizer is None:
            self.freeze()

    @property
    def n_activations(self) -> int:
        """Numbers that the decoder computes for one image."""
        values, total = self.log_std.new_zeros(1, self.latent_size), 0
        with torch.no_grad():
            for layer in self.decoder:
                values = layer(values)
                total += values.numel()
        return total

    @property
    def sharded(self) -> nn.Module:
        """Encoder, decoder and the noise of a pixel."""
        return self

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, C, H, W)`` in [0, 1] to means and logarithms of variances of latents, ``(N, latent size)`` each."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        # Beyond this range the exponential overflows, and nothing is left to learn.
        return mean, log_variance.clamp(-12, 6)

    def forward(self, images: Tensor) -> Tensor:
        """Images to what the prior makes of their most likely latents."""
        decoded: Tensor = self.decoder(self.encode(images)[0])
        return decoded

    def training_step(self, pair: GradientPair, batch_idx: int) -> Tensor:
        """The negative evidence lower bound of a batch's images, per pixel."""
        seed = mixed_seed("latents", self._seed, self.current_epoch, batch_idx, self.trainer.global_rank)
        loss = self._loss(pair.images.flatten(0, 1), torch.Generator().manual_seed(seed))
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True, sync_dist=True, batch_size=len(pair))
        return loss

    def validation_step(self, pair: GradientPair, batch_idx: int) -> dict[str, Tensor]:
        """Hand the reconstructions of public images held out to the callbacks."""
        if self.is_waited_for(batch_idx):
            self(pair.images.flatten(0, 1))
        return {"reconstructions": self(pair.images.flatten(0, 1)).view_as(pair.images)}

    def _loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_variance = self.encode(images)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        decoded = self.decoder(mean + (0.5 * log_variance).exp() * noise)
        error = 0.5 * ((decoded - images) / self.log_std.exp()).square() + self.log_std
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
        return error.mean() + divergence.mean() / images[0].numel()

    def configure_optimizers(self) -> Any:
        """The optimiser and schedule of the config."""
        assert self._optimizer is not None, "a frozen image prior is not trained"
        return configure_optimizer(self, self._optimizer)


def load_image_prior(folder: Path, shape: ImageShape, device: torch.device) -> ImagePrior:
    """The image prior of a run.

    Args:
        folder: of ``task=image_prior``.
        shape: of the images that are attacked.
        device: where to put it.

    Raises:
        ConfigError, CheckpointError: it is no such run, or of images of another size, or damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"attack.image_prior: {folder} is not a run's folder: it has no config.yaml. Train one: "
            "`python train.py configs/image_prior.yaml`."
        )
    config = load_config(folder)
    if config.task != "image_prior":
        raise ConfigError(f"attack.image_prior: {folder} is a run of task={config.task}, and not of task=image_prior.")
    if image_shape(config.data) != shape:
        raise ConfigError(
            f"attack.image_prior: {folder} makes images of {image_shape(config.data)}, and those attacked are of "
            f"{shape} (channels, height, width). Train one with the same data.image_size and data.channels."
        )
    prior = ImagePrior(config.image_prior, shape, config.seed)
    path = checkpoint_path(folder, available_checkpoint(folder, config.evaluation.checkpoint))
    state = load_checkpoint(path)["state_dict"]
    try:
        prior.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its run's config.yaml: {misfit(error)}") from error
    return prior.to(device).eval()


def _decoder(latent_size: int, widths: list[int], channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Linear(latent_size, widths[0] * _SMALLEST**2),
        nn.Unflatten(1, (widths[0], _SMALLEST, _SMALLEST)),
        nn.SiLU(),
    ]
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Sigmoid())


def _encoder(latent_size: int, widths: list[int], channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1), nn.SiLU()]
    for wide, narrow in reversed(list(itertools.pairwise(widths))):
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[0] * _SMALLEST**2, 2 * latent_size))
