"""`IterativeAttack`: leaks to images by gradient matching, from noise or from another attack's result."""

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gitlight.architecture import Architecture
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.labels import labels_from_leak
from gitlight.attacks.matching import Matched, Record, match_gradients, searches_at_once
from gitlight.attacks.variables import Pixels
from gitlight.config import MatchingConfig
from gitlight.data.pair import Gradients
from gitlight.data.sampling import mixed_seed
from gitlight.gradients.precision import full_float32


class Prior(Protocol):
    """What a search starts from."""

    def __call__(self, gradients: Gradients, numbers: Tensor, labels: Tensor | None) -> Tensor:
        """Leaks, their numbers and, if given, labels (as `IterativeAttack.search` takes them) to images.

        These are ``(B, N, C, H, W)``; NaN where there is none.
        """
        ...


_SPREAD = 0.25
"""Standard deviation of the noise that a search starts from, about that of photographs, around mid-grey."""

_SMALLEST_STEP = 1e-6
"""From a prior, in pixel values: one that is exact on public images need not be so on all."""


_STEP_SHARE = 0.3
"""Of a start's error, to take as large steps near it as from noise."""

_KINK_WIDTH = 0.03
"""Of ReLUs, near a solution; from noise, it finds nearer gradients of worse images."""


class Searched(NamedTuple):
    """What was found for ``B`` leaks.

    Attributes:
        images: ``(B, N, C, H, W)`` in [0, 1]; NaN where there is none.
        verdicts: in words.
        distances: ``(B,)``, of the gradients.
        iterations: ``(B,)``, steps taken by the search that counts.
    """

    images: Tensor
    verdicts: tuple[str, ...]
    distances: Tensor
    iterations: Tensor


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
    ) -> None:
        """Args: the leaked model as the attack knows it, settings, images per leak, a seed, what to start from.

        ``prior_error`` is the root mean squared error of that start, in whose proportion searches from it take steps;
        None: they are as from noise.
        """
        self._architecture, self._function, self.settings = architecture, function, settings
        self._n_images, self._seed, self._prior = client_batch_size, seed, prior
        self._restart_spread = 0.2 * min(_SPREAD, _SPREAD if prior_error is None else prior_error)
        self.settings_from_prior = settings
        if prior_error is not None:
            self.settings_from_prior = _near(settings, min(1.0, prior_error))
        self.at_once = searches_at_once(architecture, settings, client_batch_size)

    def search(
        self, gradients: Gradients, numbers: Tensor, labels: Tensor | None = None, record: Record | None = None
    ) -> Searched:
        """Attack leaks, all at once.

        Args:
            gradients: of ``B`` leaks.
            numbers: ``(B,)``: fixes each leak's noise, whatever its batch.
            labels: ``(B, N)``, for ``attack.labels=given``.
            record: is told how the searches go.
        """
        first = next(iter(gradients.values()))
        dtype = torch.float64 if self.settings.dtype == "float64" else torch.float32
        usable = _usable(gradients)
        which = usable.nonzero().squeeze(1)
        images = first.new_full((len(first), self._n_images, *self._architecture.image_shape), torch.nan, dtype=dtype)
        distances = torch.full((len(first),), torch.inf, dtype=dtype, device=first.device)
        iterations = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        verdicts = ["failed: the gradient is zero, or not finite"] * len(first)
        if len(which):
            with torch.autocast(first.device.type, enabled=False), full_float32():
                known = None if labels is None else labels[which]
                given = {name: gradient[which] for name, gradient in gradients.items()}
                prior = None if self._prior is None else self._prior(given, numbers[which], known).to(images)
                begun = torch.zeros_like(which, dtype=torch.bool)
                if prior is not None:
                    begun = torch.isfinite(prior).flatten(1).all(dim=1)
                # A leak for which the prior has no image is searched for from noise, with noise's steps.
                for rows, settings in ((begun, self.settings_from_prior), (~begun, self.settings)):
                    if not bool(rows.any()):
                        continue
                    start = prior[rows] if prior is not None and rows is begun else None
                    self._search_usable(
                        gradients, numbers, labels, which[rows], dtype, record, images, distances, iterations,
                        verdicts, start, settings,
                    )  # fmt: skip
        return Searched(images.float().clamp(0, 1), tuple(verdicts), distances, iterations)

    def _search_usable(
        self,
        gradients: Gradients,
        numbers: Tensor,
        labels: Tensor | None,
        which: Tensor,
        dtype: torch.dtype,
        record: Record | None,
        images: Tensor,
        distances: Tensor,
        iterations: Tensor,
        verdicts: list[str],
        prior: Tensor | None,
        settings: MatchingConfig,
    ) -> None:
        """Fill in what is found for the leaks that are ``which``."""
        function = self._function.to(images.device, dtype)
        given = {name: gradient[which] for name, gradient in gradients.items()}
        leaks = {name: gradient.to(dtype) for name, gradient in given.items()}
        known = None if labels is None else labels[which]
        for restart in range(self.settings.restarts):
            seeds = [mixed_seed("attack start", self._seed, restart, int(number)) for number in numbers[which]]
            start = self._start(prior, restart, seeds, images)
            targets = self._targets(given, seeds, known, images)
            if prior is not None and self._n_images > 1 and self.settings.labels != "optimised":
                targets = _assigned(function, start, targets)

            def told(rows: Tensor, iteration: int, shown: Tensor, apart: Tensor) -> None:
                assert record is not None
                record(which[rows], iteration, shown, apart)

            found = self._matched(
                function,
                leaks,
                settings,
                start,
                seeds,
                targets,
                told if record is not None and restart == 0 else None,
                prior,
            )
            better = found.distances < distances[which]
            rows = which[better]
            images[rows], distances[rows] = found.images[better], found.distances[better]
            iterations[rows] = found.iterations[better]
            for row, diverged in zip(which.tolist(), found.diverged.tolist(), strict=True):
                if restart == 0 or not diverged:
                    verdicts[row] = "diverged: the best image before is kept" if diverged else ""
        for row in which.tolist():
            if not torch.isfinite(images[row]).all():
                verdicts[row] = "failed: the search diverged at once"

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

    def _targets(self, gradients: Gradients, seeds: list[int], labels: Tensor | None, like: Tensor) -> Tensor:
        n_classes = self._architecture.n_classes
        if self.settings.labels == "optimised":
            logits = [
                torch.randn(
                    (self._n_images, n_classes), generator=torch.Generator().manual_seed(seed + 1), device="cpu"
                )
                for seed in seeds
            ]
            return torch.stack(logits).to(like)
        if self.settings.labels == "recovered":
            labels = labels_from_leak(self._architecture, gradients, self._n_images)
        assert labels is not None, "attack.labels=given hands them over"
        return torch.nn.functional.one_hot(labels.to(like.device), n_classes).to(like)


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


def _assigned(function: LeakedFunction, images: Tensor, targets: Tensor) -> Tensor:
    """Labels in the order of the images that a search starts from: those of least cross-entropy.

    A prior's images of a client batch are in no order, and nor are labels.
    """
    result = []
    for its_images, its_targets in zip(images, targets, strict=True):
        with torch.no_grad():
            costs = -function.logits(its_images).log_softmax(dim=1) @ its_targets.T
        _, order = linear_sum_assignment(costs.nan_to_num(1e30).double().cpu().numpy())
        result.append(its_targets[torch.from_numpy(order).to(its_targets.device)])
    return torch.stack(result)


def _usable(gradients: Gradients) -> Tensor:
    finite = torch.stack([torch.isfinite(g).flatten(1).all(dim=1) for g in gradients.values()]).all(dim=0)
    return finite & torch.stack([(g != 0).flatten(1).any(dim=1) for g in gradients.values()]).any(dim=0)
