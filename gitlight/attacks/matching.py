"""`match_gradients`: the loop that all iterative attacks share. Many independent searches at once, on one device."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gitlight.architecture import Architecture
from gitlight.attacks.gradients import LeakedFunction
from gitlight.attacks.objective import Objective, Value, layer_weights
from gitlight.attacks.optimizers import build_optimizer, step_size
from gitlight.attacks.variables import Variables
from gitlight.config import MatchingConfig
from gitlight.data.pair import Gradients

_CHECKED_EVERY = 10
"""Iterations after which searches that have ended are taken out."""

Record = Callable[[Tensor, int, Tensor, Tensor], None]
"""Is told now and then: which searches ``(b,)``, the iteration, images ``(b, N, C, H, W)`` and distances ``(b,)``."""


class Matched(NamedTuple):
    """What ``B`` searches found.

    Attributes:
        images: ``(B, N, C, H, W)``, of the smallest objective on the way; NaN where the search diverged at once.
        targets: ``(B, N, classes)``, probabilities of the labels there.
        distances: ``(B,)``, of the gradients there.
        iterations: ``(B,)`` int64, steps taken.
        diverged: ``(B,)`` bool, whether the search came to a value that is not finite, and ended there.
        variables: ``(B, n)``, those that the images were made of.
    """

    images: Tensor
    targets: Tensor
    distances: Tensor
    iterations: Tensor
    diverged: Tensor
    variables: Tensor


def searches_at_once(
    architecture: Architecture, settings: MatchingConfig, client_batch_size: int, further: int = 0
) -> int:
    """How many searches fit into ``attack.memory_limit_gb``: at least one.

    A search holds its gradient, the leak, and what differentiating the gradient once more needs; L-BFGS its history;
    and ``further`` numbers.
    """
    entry = 4 if settings.dtype == "float32" else 8
    size = math.prod(architecture.image_shape) * client_batch_size
    entries = further + 8 * architecture.n_parameters + 10 * architecture.n_activations * client_batch_size
    entries += (200 if settings.optimizer == "lbfgs" else 6) * size
    return max(1, int(settings.memory_limit_gb * 1e9 / (entry * entries)))


def match_gradients(
    function: LeakedFunction,
    settings: MatchingConfig,
    leaks: Gradients,
    variables: Variables,
    targets: Tensor,
    record: Record | None = None,
    prior: Tensor | None = None,
) -> Matched:
    """Search for the images whose gradients are nearest to those that leaked.

    Args:
        function: the leaked model, with the weights that the attack knows, on the device and in the precision of the
            search.
        settings: of the attack.
        leaks: of ``B`` leaks, there, finite and not zero.
        variables: what to move, and where to begin.
        targets: ``(B, N, classes)``: probabilities of the labels; where labels are optimised, the logits to start from.
        record: is told how the searches go.
        prior: ``(B, N, C, H, W)``, what ``attack.prior_weight`` draws towards; NaN where there is none; None: nowhere.
    """
    searches = _Searches(function, settings, leaks, variables, targets, record, prior)
    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernel of CPUs
        for iteration in range(settings.iterations + 1):
            searches.advance(iteration)
            if len(searches.live) == 0:
                break
    return searches.found()


class _Searches:
    """The state of all searches; those that go on are ``live``."""

    def __init__(
        self,
        function: LeakedFunction,
        settings: MatchingConfig,
        leaks: Gradients,
        variables: Variables,
        targets: Tensor,
        record: Record | None,
        prior: Tensor | None,
    ) -> None:
        self._settings, self._record = settings, record
        self._moved, start = variables, variables.start
        self._n_moved, self._constants = start.shape[1], variables.constants
        self._images = torch.func.vmap(variables.images)
        self._label_shape = targets.shape[1:]
        self._optimise_labels = settings.labels == "optimised"
        parts = [start] + ([targets.flatten(1)] if self._optimise_labels else [])
        self._variables = torch.cat(parts, dim=1)
        self._leaks, self._targets = leaks, targets
        shape = (targets.shape[1], *function.architecture.image_shape)
        given = start.new_full((len(start), *shape), torch.nan) if prior is None else prior
        self._has_prior = torch.isfinite(given).flatten(1).all(dim=1)
        self._prior = torch.where(self._has_prior.view(-1, 1, 1, 1, 1), given, 0.0)
        self._ended = torch.zeros_like(self._has_prior)
        self._targets_of_all = targets
        self._weights = layer_weights(function.architecture, leaks, settings.layer_weights)
        self._optimizer = build_optimizer(settings.optimizer)
        self.live = torch.arange(len(start), device=start.device)
        self._best = self._variables.clone()
        self._best_objective = torch.full((len(start),), torch.inf, dtype=start.dtype, device=start.device)
        self._best_distance = self._best_objective.clone()
        self._iterations = torch.zeros(len(start), dtype=torch.int64, device=start.device)
        self._diverged = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        objective = Objective(function, settings)

        def of_variables(row: Tensor, constants: Tensor, targets: Tensor, *others: Any) -> tuple[Tensor, Value]:
            moved = row[: self._n_moved]
            if self._optimise_labels:
                targets = torch.softmax(row[self._n_moved :].view(self._label_shape), dim=1)
            total, value = objective(variables.images(moved, constants), targets, *others)
            return total + variables.penalty(moved), value

        differentiated = torch.func.grad_and_value(of_variables, has_aux=True)
        self._evaluate = torch.func.vmap(differentiated, in_dims=0)

    def advance(self, iteration: int) -> None:
        """Look where the searches are, and take a step, unless it was the last."""
        settings = self._settings
        progress = iteration / settings.iterations
        prior_weight = (
            settings.prior_weight * 0.5 * (1 + math.cos(math.pi * progress)) * self._has_prior.to(self._prior)
        )
        gradients, (_, value) = self._evaluate(
            self._variables, self._constants, self._targets, self._leaks, self._weights, self._prior, prior_weight
        )
        finite = torch.isfinite(gradients).all(dim=1) & torch.isfinite(value.distance)
        objective = torch.where(finite, value.distance + value.image_terms, torch.inf)
        better = objective < self._best_objective[self.live]
        rows = self.live[better]
        self._best[rows] = self._variables[better]
        self._best_objective[rows] = objective[better]
        self._best_distance[rows] = value.distance[better]
        going = ~self._ended
        self._iterations[self.live[going]] = iteration
        self._diverged[self.live[going & ~finite]] = True
        last = iteration == settings.iterations
        arrived = value.distance < settings.tolerance
        due = last or iteration % settings.record_every == 0 or iteration in settings.snapshots
        shown = going & finite & (arrived | due)
        if self._record is not None and bool(shown.any()):
            images = self._images(self._variables[shown, : self._n_moved], self._constants[shown])
            self._record(self.live[shown], iteration, images, value.distance[shown])
        ended = self._ended | arrived | ~finite
        self._ended = ended
        if last:
            return
        moved = self._optimizer.step(
            self._variables, gradients, step_size(settings.step_size, settings.decay, progress)
        )
        moved[:, : self._n_moved] = self._moved.constrain(moved[:, : self._n_moved])
        # Those that have ended stay where they are until they are taken out.
        self._variables = torch.where(ended.unsqueeze(1), self._variables, moved)
        if bool(ended.any()) and (iteration % _CHECKED_EVERY == 0 or bool(ended.all()) or bool((~finite).any())):
            self._keep((~ended).nonzero().squeeze(1))

    def found(self) -> Matched:
        """The best of each search."""
        best = self._best[:, : self._n_moved]
        images = self._images(best, self._moved.constants)
        lost = torch.isinf(self._best_objective).view(-1, 1, 1, 1, 1)
        targets = self._targets_of_all
        if self._optimise_labels:
            targets = torch.softmax(self._best[:, self._n_moved :].view(-1, *self._label_shape), dim=2)
        return Matched(
            torch.where(lost, torch.nan, images), targets, self._best_distance, self._iterations, self._diverged, best
        )

    def _keep(self, rows: Tensor) -> None:
        self.live = self.live[rows]
        self._variables, self._targets, self._prior = self._variables[rows], self._targets[rows], self._prior[rows]
        self._constants = self._constants[rows]
        self._leaks = {name: leak[rows] for name, leak in self._leaks.items()}
        self._weights, self._has_prior, self._ended = self._weights[rows], self._has_prior[rows], self._ended[rows]
        self._optimizer.keep(rows)
