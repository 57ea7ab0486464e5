"""`IterativeAttack`: leaks to images by gradient matching, from noise or from another attack's result."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gitlight.architecture import Architecture
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.labels import LabelReader
from gitlight.attacks.matching import Matched, Record, match_gradients, searches_at_once
from gitlight.attacks.variables import Pixels
from gitlight.config import MatchingConfig
from gitlight.data.pair import Gradients, as_rows
from gitlight.data.sampling import mixed_seed
from gitlight.generators.base import Reconstruction
from gitlight.generators.exact.labels import NO_LABEL
from gitlight.gradients.precision import full_float32


class Prior(Protocol):
    """What a search starts from."""

    def __call__(self, gradients: Gradients, numbers: Tensor, labels: Tensor | None) -> Reconstruction:
        """Leaks, their numbers and, if given, labels (as `IterativeAttack.search` takes them) to images.

        Labels that come with the images are used where none are given.
        """
        ...


_SPREAD = 0.25
"""Standard deviation of the noise that a search starts from, about that of photographs, around mid-grey."""

_SMALLEST_STEP = 1e-6
"""From a prior, in pixel values: one that is exact on public images need not be so on all."""


_STEP_SHARE = 0.3
"""Of a start's error, to take as large steps near it as from noise."""

_SURE = 0.99
"""Probability of the label read off a leak, where a search for labels begins near a prior's images."""

_KINK_WIDTH = 0.03
"""Of ReLUs, near a solution; from noise, it finds nearer gradients of worse images."""


Told = Callable[[Tensor, int, int, Tensor, Tensor], None]
"""Is told now and then: which leaks ``(b,)``, restart, iteration, images ``(b, N, C, H, W)``, distances ``(b,)``."""


@dataclass
class Searched:
    """What was found for ``B`` leaks.

    Attributes:
        images: ``(B, N, C, H, W)`` in [0, 1]; NaN where there is none.
        verdicts: in words.
        distances: ``(B,)``, of the gradients.
        iterations: ``(B,)``, steps taken by the search that counts.
        restarts: ``(B,)``, which one that is, from 0.
        labels: ``(B, N)``, those that came with a prior's images, if they were used; -1 where there is none.
    """

    images: Tensor
    verdicts: list[str]
    distances: Tensor
    iterations: Tensor
    restarts: Tensor
    labels: Tensor | None = None


class IterativeAttack:
    """Searches for images whose gradients match; see `gitlight.attacks.matching`.

    Attributes:
        settings: of searches from noise.
        settings_from_prior: of those from a prior's images.
        at_once: leaks that fit into ``attack.memory_limit_gb``.
    """

    def __init__(
        self,
        architecture: Architecture,
        function: LeakedFunction,
        settings: MatchingConfig,
        client_batch_size: int,
        seed: int,
        prior: Prior | None = None,
        prior_error: float | None = None,
        read_labels: LabelReader | None = None,
    ) -> None:
        """Args: the leaked model as the attack knows it, settings, images per leak, a seed, what to start from.

        ``prior_error`` is the root mean squared error of that start, in whose proportion searches from it take steps;
        None: they are as from noise. ``read_labels`` reads labels off leaks; None: with no pair to learn from.
        """
        self._architecture, self._function, self.settings = architecture, function, settings
        self._n_images, self._seed, self._prior = client_batch_size, seed, prior
        self._read_labels = read_labels or LabelReader(architecture, client_batch_size)
        self._restart_spread = 0.2 * min(_SPREAD, _SPREAD if prior_error is None else prior_error)
        self.settings_from_prior = settings
        if prior_error is not None:
            self.settings_from_prior = _near(settings, min(1.0, prior_error))
        self.at_once = searches_at_once(architecture, settings, client_batch_size)

    def search(
        self, gradients: Gradients, numbers: Tensor, labels: Tensor | None = None, told: Told | None = None
    ) -> Searched:
        """Attack leaks, all at once.

        Args:
            gradients: of ``B`` leaks.
            numbers: ``(B,)``: fixes each leak's noise, whatever its batch.
            labels: ``(B, N)``, for ``attack.labels=given``.
            told: is told how the searches go.
        """
        first = next(iter(gradients.values()))
        dtype = torch.float64 if self.settings.dtype == "float64" else torch.float32
        which = _usable(gradients).nonzero().squeeze(1)
        shape = (len(first), self._n_images, *self._architecture.image_shape)
        found = Searched(
            first.new_full(shape, torch.nan, dtype=dtype),
            ["failed: the gradient is zero, or not finite"] * len(first),
            torch.full((len(first),), torch.inf, dtype=dtype, device=first.device),
            torch.zeros(len(first), dtype=torch.int64, device=first.device),
            torch.zeros(len(first), dtype=torch.int64, device=first.device),
        )
        if len(which):
            with torch.autocast(first.device.type, enabled=False), full_float32():
                known = None if labels is None else labels[which]
                given = {name: gradient[which] for name, gradient in gradients.items()}
                made = None if self._prior is None else self._prior(given, numbers[which], known)
                begun = torch.zeros_like(which, dtype=torch.bool)
                if made is not None:
                    made = made._replace(images=made.images.to(found.images))
                    begun = torch.isfinite(made.images).flatten(1).all(dim=1)
                    if made.labels is not None and known is None:
                        found.labels = torch.full((len(first), self._n_images), NO_LABEL).to(made.labels)
                        found.labels[which] = made.labels
                # A leak for which the prior has no image is searched for from noise, with noise's steps.
                for rows, settings in ((begun, self.settings_from_prior), (~begun, self.settings)):
                    if bool(rows.any()):
                        start = _some(made, rows) if made is not None and rows is begun else None
                        own = {name: gradient[rows] for name, gradient in given.items()}
                        its_labels = None if known is None else known[rows]
                        self._search(which[rows], own, numbers[which[rows]], its_labels, start, settings, found, told)
        found.images = found.images.float().clamp(0, 1)
        return found

    def _search(
        self,
        which: Tensor,
        gradients: Gradients,
        numbers: Tensor,
        labels: Tensor | None,
        prior: Reconstruction | None,
        settings: MatchingConfig,
        found: Searched,
        told: Told | None,
    ) -> None:
        """Put in what is found for the leaks that are ``which``, to whom all else belongs."""
        images = found.images
        function = self._function.to(images.device, images.dtype)
        leaks = {name: gradient.to(images.dtype) for name, gradient in gradients.items()}
        for restart in range(settings.restarts):
            seeds = [mixed_seed("attack start", self._seed, restart, int(number)) for number in numbers]
            near = None if prior is None else prior.images
            start = self._start(near, restart, seeds, images)
            targets = self._targets(function, gradients, seeds, labels, start, prior)

            def record(rows: Tensor, iteration: int, shown: Tensor, apart: Tensor, restart: int = restart) -> None:
                assert told is not None
                told(which[rows], restart, iteration, shown, apart)

            matched = self._matched(
                function, leaks, settings, start, seeds, targets, None if told is None else record, near
            )
            better = matched.distances < found.distances[which]
            rows = which[better]
            found.images[rows], found.distances[rows] = matched.images[better], matched.distances[better]
            found.iterations[rows], found.restarts[rows] = matched.iterations[better], restart
            for row, diverged in zip(which.tolist(), matched.diverged.tolist(), strict=True):
                if restart == 0 or not diverged:
                    found.verdicts[row] = "diverged: the best image before is kept" if diverged else ""
        for row in which.tolist():
            if not torch.isfinite(found.images[row]).all():
                found.verdicts[row] = "failed: the search diverged at once"

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
        """One search for each leak, from the images ``start`` on; ``seeds`` are for what else is drawn."""
        return match_gradients(function, settings, leaks, Pixels(start, settings.box), targets, record, prior)

    def _start(self, prior: Tensor | None, restart: int, seeds: list[int], like: Tensor) -> Tensor:
        shape = (self._n_images, *self._architecture.image_shape)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu") for seed in seeds]
        drawn = torch.stack(noise).to(like)
        start = 0.5 + _SPREAD * drawn
        if prior is not None:
            usable = torch.isfinite(prior).flatten(1).all(dim=1).view(-1, 1, 1, 1, 1)
            # The first search starts from the prior itself, further ones from around it.
            start = torch.where(usable, prior + (0.0 if restart == 0 else self._restart_spread) * drawn, start)
        return start.clamp(0, 1) if self.settings.box else start

    def _targets(
        self,
        function: LeakedFunction,
        gradients: Gradients,
        seeds: list[int],
        labels: Tensor | None,
        start: Tensor,
        prior: Reconstruction | None,
    ) -> Tensor:
        """Labels, or logits of labels that are searched for: ``(B, N, classes)``."""
        n_classes, searched = self._architecture.n_classes, self.settings.labels == "optimised"
        of_prior = None if prior is None else prior.labels
        readable = of_prior is not None or self._read_labels.readable
        if searched and not (prior is not None and readable):
            logits = [
                torch.randn(
                    (self._n_images, n_classes), generator=torch.Generator().manual_seed(seed + 1), device="cpu"
                )
                for seed in seeds
            ]
            return torch.stack(logits).to(start)
        if self.settings.labels != "given":
            labels = self._read_labels(gradients) if of_prior is None else of_prior
        assert labels is not None, "attack.labels=given hands them over"
        labels = labels.to(start.device)
        if prior is not None and self._n_images > 1:
            labels = _assigned(function, start, labels, of_prior)
        targets = torch.nn.functional.one_hot(labels, n_classes).to(start)
        # Beside good images, labels drawn at random would be what is most wrong, and images would pay for it.
        return targets * math.log(_SURE / (1 - _SURE) * (n_classes - 1)) if searched else targets


def _near(settings: MatchingConfig, error: float) -> MatchingConfig:
    """Settings of a search that begins at images of that root mean squared error."""
    step = settings.step_size
    if settings.optimizer != "lbfgs":  # whose steps have a length of their own
        step = max(_SMALLEST_STEP, _STEP_SHARE * step * error)
    return replace(
        settings,
        step_size=step,
        total_variation=settings.total_variation * error**2,
        kink_width=_KINK_WIDTH if settings.kink_width is None else settings.kink_width,
    )


def _some(made: Reconstruction, rows: Tensor) -> Reconstruction:
    """What was made of some of the leaks."""
    return Reconstruction(made.images[rows], (), None if made.labels is None else made.labels[rows])


def _assigned(function: LeakedFunction, images: Tensor, labels: Tensor, of_prior: Tensor | None) -> Tensor:
    """Labels ``(B, N)`` in the order of the images that a search starts from.

    That is the prior's own order, if it has read off the same labels. Else its images are in no order, and nor are
    labels: they are put in that of least cross-entropy.
    """
    result = []
    for number, (its_images, its_labels) in enumerate(zip(images, labels, strict=True)):
        own = None if of_prior is None else of_prior[number].to(its_labels)
        if own is not None and torch.equal(own.sort().values, its_labels.sort().values):
            result.append(own)
            continue
        with torch.no_grad():
            costs = -function.logits(its_images).log_softmax(dim=1)[:, its_labels]
        _, order = linear_sum_assignment(costs.nan_to_num(1e30).double().cpu().numpy())
        result.append(its_labels[torch.from_numpy(order).to(its_labels.device)])
    return torch.stack(result)


def _usable(gradients: Gradients) -> Tensor:
    finite = torch.stack([as_rows(torch.isfinite(g)).all(dim=1) for g in gradients.values()]).all(dim=0)
    return finite & torch.stack([as_rows(g != 0).any(dim=1) for g in gradients.values()]).any(dim=0)
