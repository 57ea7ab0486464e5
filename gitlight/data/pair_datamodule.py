"""`GradientPairDataModule`, which makes gradient-image pairs of the loaders' images, on the device."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gitlight.config import ChannelConfig, DataConfig, GaussianNoiseConfig, GradientsConfig
from gitlight.data.datamodule import Batch, ImageDataModule
from gitlight.data.images import ImageSplits
from gitlight.data.pair import GradientPair
from gitlight.data.pair_clock import PairClock
from gitlight.data.sampling import mixed_seed, order_of_groups
from gitlight.errors import CheckpointError
from gitlight.generators.base import ALL_ONCE, FitPairs
from gitlight.gradients.channel import GaussianNoise, build_channel, sent
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.sketch import Sketch
from gitlight.gradients.updates import LocalUpdates, n_local_steps, smallest_local_batch
from gitlight.leaked.batch_norm import check_batch_statistics
from gitlight.leaked.model import LeakedModel
from gitlight.virtual_ranks import DividedBatch, Share


class GradientPairDataModule(ImageDataModule):
    """Makes pairs on the fly, on each rank's own device, from the images of the loaders.

    The leaked model is never handed to a generator, which gets its `Architecture`.

    Attributes:
        leaked_model: the model that leaks.
        architecture: what generators are built from: the leaked model's, with the sketch if there is one.
    """

    def __init__(
        self,
        loaded: ImageSplits,
        settings: DataConfig,
        leaked_model: LeakedModel,
        gradients: GradientsConfig,
        channel: list[ChannelConfig],
        seed: int,
    ) -> None:
        """Args: a source's images, how to use them, the model that leaks, how its gradients are made and sent.

        Raises:
            ConfigError: a batch norm layer would see a single value per channel.
        """
        super().__init__(loaded, settings, seed)
        check_batch_statistics(
            leaked_model.architecture, smallest_local_batch(gradients.updates, settings.client_batch_size)
        )
        self.leaked_model = leaked_model
        self.clock = PairClock()
        self._channel = build_channel(channel)
        self._memory_limit_gb = gradients.memory_limit_gb
        self._places: Tensor | None = None  # of images, in the order in which fits group them
        sketch = None if gradients.sketch.name == "none" else Sketch(leaked_model.architecture, gradients.sketch)
        self.architecture = (
            sketch.seen_by_generators(leaked_model.architecture) if sketch else leaked_model.architecture
        )
        several_steps = n_local_steps(gradients.updates, settings.client_batch_size) > 1
        # Channels and local steps act on whole gradients; without them they are sketched as they are made. The map is
        # linear.
        whole = bool(channel) or several_steps
        self._sketch_after = sketch if whole else None
        self._engine = GradientEngine(
            leaked_model.network, leaked_model.architecture, gradients, None if whole else sketch
        )
        self._updates = (
            LocalUpdates(leaked_model.network, leaked_model.architecture, gradients) if several_steps else None
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> GradientPair | DividedBatch:
        """Pairs; in training with several virtual ranks their images, of which pairs are made one after the other."""
        stage, epoch, n_shares = self._stage, self._epoch, len(self.shares)
        if stage != "train" or n_shares == 1:
            return self.prepare(batch, stage, epoch)
        parts = tuple(zip(*(tensor.chunk(n_shares) for tensor in batch), strict=True))
        n_leaks = len(batch[0]) // self.settings.client_batch_size
        return DividedBatch(parts, lambda part: self.prepare(part, stage, epoch), n_leaks)

    def prepare(
        self,
        batch: Batch,
        split: str,
        epoch: int,
        per_leak: int | None = None,
        noise: tuple[float, float] | None = None,
    ) -> GradientPair:
        """Turn images on a device into pairs there.

        Args:
            batch: images, labels and indices.
            split: ``train``, ``validation``, ``test``, or ``fit`` (public images before training).
            epoch: fixes mirroring, the order of local steps and the channel's noise of training pairs, which are fresh
                in every epoch; those for fits are mirrored if it is 1.
            per_leak: images of a leak; None: ``data.client_batch_size``.
            noise: lowest and highest level of the channel's Gaussian noise; None: its own.
        """
        with self.clock.running(batch[0].device):
            images, labels, indices = super().prepare(batch, split, epoch)
            per_leak = per_leak or self.settings.client_batch_size
            return self._pair(images, labels, indices, split, epoch, per_leak, noise)

    def _pair(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        split: str,
        epoch: int,
        per_leak: int,
        noise: tuple[float, float] | None,
    ) -> GradientPair:
        images = images.view(-1, per_leak, *images.shape[1:])
        labels, indices = labels.view(-1, per_leak), indices.view(-1, per_leak)
        if self.leaked_model.device != images.device:
            self.leaked_model.to(images.device)
        if self._updates is None:
            gradients = self._engine(images, labels)
        else:
            gradients = self._updates(images, labels, self._seeds("local order", split, epoch, indices))
        if self._channel or self._sketch_after is not None:
            stages = self._channel
            if noise is not None:
                other = GaussianNoise(GaussianNoiseConfig(lowest_std=noise[0], relative_std=noise[1]))
                stages = [other if isinstance(stage, GaussianNoise) else stage for stage in stages]
            seeds = self._seeds("noise", split, epoch, indices)
            gradients = sent(gradients, seeds, stages, self._sketch_after, self._memory_limit_gb)
        return GradientPair(gradients, images, labels, indices)

    def _seeds(self, purpose: str, split: str, epoch: int, indices: Tensor) -> Tensor:
        """A seed ``(B,)`` for each leak from its first image: the same on any rank, fresh in each training epoch."""
        counter = epoch if split in ("train", "fit") else 0
        return torch.tensor(
            [mixed_seed(f"{split} {purpose}", self._seed, counter, index) for index in indices[:, 0].tolist()],
            dtype=torch.int64,
        )

    def fit_pairs(
        self, device: torch.device, wanted: FitPairs = ALL_ONCE, share: Share | None = None
    ) -> Iterator[GradientPair]:
        """This rank's share of the public pairs, in the same groups at every pass: for closed-form fits.

        Args:
            device: where they are made.
            wanted: which; by default each leak once, without augmentation.
            share: one of `shares`; None: all of this rank.
        """
        per_leak = 1 if wanted.single_images else self.settings.client_batch_size
        for mirrored in range(2 if wanted.mirrored and self.settings.horizontal_flip else 1):
            mixed = self.settings.client_batch_size > 1
            for batch in self._loader("train", shuffle=False, share=share, mixed=mixed):
                images, labels, indices = (part.to(device) for part in batch)
                # As many leaks at once as ever.
                n_images = len(images) // self.settings.client_batch_size * per_leak
                for parts in zip(images.split(n_images), labels.split(n_images), indices.split(n_images), strict=True):
                    yield self.prepare(parts, "fit", mirrored, per_leak, wanted.noise)

    def fit_numbers(self, pair: GradientPair) -> Tensor:
        """Numbers of leaks among those that fits are made of, from 0, the same at every pass: ``(B,)`` int64.

        ``pair``: of `fit_pairs`; of single images they are the images' positions.
        """
        first, per_leak = pair.indices[:, 0], pair.images.shape[1]
        if per_leak == 1:
            return first
        if self._places is None:
            self._places = order_of_groups(len(self.split("train")), self._seed).argsort()
        return self._places.to(first.device)[first] // per_leak

    def private_pairs(self, device: torch.device, n_images: int) -> Iterator[GradientPair]:
        """Pairs of the first ``n_images`` private images, whole client batches of them."""
        return self._first_pairs("test", device, n_images)

    def held_out_pairs(self, device: torch.device, n_images: int) -> Iterator[GradientPair]:
        """The same of the public images that validation uses: what an attacker can try an attack on."""
        return self._first_pairs("validation", device, n_images)

    def _first_pairs(self, split: str, device: torch.device, n_images: int) -> Iterator[GradientPair]:
        left = n_images // self.settings.client_batch_size
        for batch in self._loader(split, shuffle=False):
            if left <= 0:
                return
            kept = left * self.settings.client_batch_size
            images, labels, indices = (part[:kept].to(device) for part in batch)
            yield self.prepare((images, labels, indices), split, epoch=0)
            left -= len(images) // self.settings.client_batch_size

    def state_dict(self) -> dict[str, Any]:
        """Which leaked model the pairs are of, and how far training is in its images."""
        return {**super().state_dict(), "leaked_fingerprint": self.leaked_model.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run attacks the model that it began with."""
        if state_dict["leaked_fingerprint"] != self.leaked_model.fingerprint():
            raise CheckpointError(
                "The checkpoint was made with another leaked model: its weights differ from those that `leaked` gives "
                "now. Use the run's own config.yaml, with the weights file that it names unchanged."
            )
        super().load_state_dict(state_dict)
