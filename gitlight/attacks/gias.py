"""`GIAS`: gradient matching through an image prior, its latent space first and its weights then."""

from dataclasses import replace

import torch
from torch import Tensor

from gitlight.architecture import Architecture
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.image_prior import ImagePrior
from gitlight.attacks.iterative import IterativeAttack, Prior
from gitlight.attacks.labels import LabelReader
from gitlight.attacks.matching import Matched, Record, match_gradients, searches_at_once
from gitlight.attacks.variables import DecoderWeights, Latents, n_weights
from gitlight.config import GIASConfig, MatchingConfig
from gitlight.data.pair import Gradients


class GIAS(IterativeAttack):
    """Gradient inversion with a generative image prior (Jeon et al. 2021).

    A first search finds latents whose images have the gradient that leaked, a second one changes the decoder's weights,
    a copy for each leak, so that images outside of its range can be had, too. Latents begin as standard normal noise,
    or, from a prior's images, as what the encoder makes of those.
    """

    def __init__(
        self,
        architecture: Architecture,
        function: LeakedFunction,
        settings: GIASConfig,
        client_batch_size: int,
        seed: int,
        prior: Prior | None = None,
        *,
        image_prior: ImagePrior,
        read_labels: LabelReader | None = None,
    ) -> None:
        """Args: those of `IterativeAttack`, and the image prior."""
        super().__init__(architecture, function, settings, client_batch_size, seed, prior, read_labels=read_labels)
        self._image_prior = image_prior
        # A search holds its own weights, their gradient, Adam's two means, the best so far, and copies under way.
        further = 10 * n_weights(image_prior.decoder) + 4 * client_batch_size * image_prior.n_activations
        self.at_once = searches_at_once(architecture, settings, client_batch_size, further)

    def _matched(
        self,
        function: LeakedFunction,
        leaks: Gradients,
        settings: MatchingConfig,
        start: Tensor,
        seeds: list[int],
        targets: Tensor,
        record: Record | None,
        prior: Tensor | None,
    ) -> Matched:
        assert isinstance(settings, GIASConfig)
        n = settings.iterations
        n_first = round(settings.latent_share * n)
        drawing, place = torch.Size((self._n_images, self._image_prior.latent_size)), torch.device("cpu")
        drawn = [
            torch.randn(drawing, generator=torch.Generator().manual_seed(seed + 2), device=place) for seed in seeds
        ]
        latents = torch.stack(drawn).to(start)
        if prior is not None:
            usable = torch.isfinite(prior).flatten(1).all(dim=1).view(-1, 1, 1)
            with torch.no_grad():
                encoded = self._image_prior.encode(start.flatten(0, 1).float())[0].view_as(latents).to(start)
            latents = torch.where(usable, encoded, latents)
        first = None
        if n_first:
            moved = Latents(self._image_prior, latents, settings.latent_weight)
            first = match_gradients(
                function, replace(settings, iterations=n_first), leaks, moved, targets, record, prior
            )
            latents = first.variables.view_as(latents)
            # Probabilities back to logits, where labels are searched for.
            targets = first.targets.clamp_min(1e-30).log() if settings.labels == "optimised" else first.targets
        if first is not None and n_first == n:
            return first

        def later(rows: Tensor, iteration: int, images: Tensor, distances: Tensor) -> None:
            assert record is not None
            if iteration or first is None:  # else the first search has said so
                record(rows, n_first + iteration, images, distances)

        second = match_gradients(
            function,
            replace(
                settings,
                iterations=n - n_first,
                step_size=settings.weights_step_size,
                # In a first search it has fallen to zero.
                prior_weight=settings.prior_weight if first is None else 0.0,
                snapshots=[step - n_first for step in settings.snapshots],
            ),
            leaks,
            DecoderWeights(self._image_prior, latents),
            targets,
            None if record is None else later,
            prior,
        )
        if first is None:
            return second
        lost = torch.isinf(second.distances)
        return second._replace(
            images=torch.where(lost.view(-1, 1, 1, 1, 1), first.images, second.images),
            targets=torch.where(lost.view(-1, 1, 1), first.targets, second.targets),
            distances=torch.where(lost, first.distances, second.distances),
            iterations=first.iterations + second.iterations,
            diverged=first.diverged | second.diverged,
        )
