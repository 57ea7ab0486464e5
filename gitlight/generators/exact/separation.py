"""Telling the images of a client batch apart, by the last layer's gradient and forward equations together."""

from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.generators.exact.labels import labels_of_batch, next_labels_of_batch
from gitlight.generators.exact.separation_search import Problem, nearest, search
from gitlight.generators.exact.separation_starts import can_turn, first_order, turned

_EXPLAINED, _EXACT = 8.0, 1e-6
"""What the squared residual may be where a search has arrived: in units of what noise leaves (of eight images of LeNet
without noise it is 0 to 6 times as much, and 80 times and more elsewhere), or, as noise is not all that is inexact, of
the directions' own sizes (there below 1e-7, and above 1e-5 elsewhere)."""

_MOVED = (0.05, 0.3, 1.0)
"""How far first starts are moved at random, in units of the spread over the images; one after the other, where searches
from those before have not arrived."""

_TURNS = 8
"""Starts along the valley that each of them leads to."""

_IN_VALLEY = 1e-3
"""Squared residual, in units of the directions' own sizes, that a whitened search leaves at most where weights are
right: beyond, searching along a valley would take long, and lead nowhere."""

_MOST_TO_TURN = 1 << 16
"""Entries of one leak's Jacobian: beyond, so many searches would take seconds a leak."""

_OTHER_LABELS = 3
"""Sets of labels that are tried where those that were read off do not lead to any images."""

_MOST_AT_ONCE = 1 << 25
"""Entries of all leaks' Jacobians at once, 256 MiB."""


class Separated(NamedTuple):
    """What the last layer made of each image of ``B`` client batches of ``N``, in the order of their labels.

    Attributes:
        inputs: ``(B, N, features)``.
        inputs_variance: ``(B, N)``, of the error of an entry: mean over the entries.
        labels: ``(B, N)`` int64, ascending.
    """

    inputs: Tensor
    inputs_variance: Tensor
    labels: Tensor


class Typical(NamedTuple):
    """What is known of all images, from public ones.

    Attributes:
        inputs: ``(features,)``, mean input of the last layer.
        spread: ``()``, standard deviation of an entry of it, in the mean over the entries.
        probabilities: ``(classes,)``, mean softmax probabilities.
    """

    inputs: Tensor
    spread: Tensor
    probabilities: Tensor


def separable(n_images: int, n_classes: int, n_features: int) -> bool:
    """Whether there are more equations than unknowns: ``N`` images are told apart by fewer than all classes.

    ``Σ_n δ_n [a_n; 1]ᵀ`` has rank ``N``, which leaves ``N (N − 1)`` unknowns; ``δ`` of an image adds up to zero, so
    that there are ``(classes − 1) N`` equations.
    """
    return 1 < n_images < n_classes and n_images <= n_features


def n_equations_and_unknowns(n_images: int, n_classes: int) -> tuple[int, int]:
    """Of the least squares problem of one leak; what it takes grows with their product."""
    return (n_classes + 1 + n_images) * n_images, n_images**2


def separate(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    noise: Tensor,
    weight: Tensor,
    bias: Tensor,
    typical: Typical,
    n_images: int,
) -> Separated:
    """Each image's input of a last linear layer whose weights are known, from the mean gradient of ``N`` images.

    Weight and bias gradient together are ``1/N Σ_n δ_n [a_n; 1]ᵀ``: the ``[a_n; 1]`` lie in the space of the ``N``
    leading right singular vectors, and ``δ_n = softmax(W a_n + b) − y_n``. What is left, ``N`` coordinates for each
    image, is found by damped least squares (Levenberg 1944, Marquardt 1963) on the gradient, from the first-order
    solution for probabilities that do not depend on the image: the rows of classes of which there is an image hold
    ``−a_n``. Images with the same label differ by their probabilities; where several do, there are several minima, and
    searches start again along the valley that these lie in.

    Args:
        weight_gradient: ``(B, classes, features)`` float64, finite.
        bias_gradient: ``(B, classes)``.
        noise: ``(B,)``, standard deviation of the error of an entry, above zero.
        weight: ``(classes, features)``, up to a row common to all classes.
        bias: ``(classes,)``, likewise.
        typical: of other images.
        n_images: ``N``; see `separable`.
    """
    equations, unknowns = n_equations_and_unknowns(n_images, len(bias))
    chunk = max(1, _MOST_AT_ONCE // (equations * unknowns * max(_TURNS, _OTHER_LABELS)))
    if len(noise) > chunk:
        parts = zip(weight_gradient.split(chunk), bias_gradient.split(chunk), noise.split(chunk), strict=True)
        solved = [separate(w, b, its_noise, weight, bias, typical, n_images) for w, b, its_noise in parts]
        return Separated(*(torch.cat(each) for each in zip(*solved, strict=True)))
    if len(noise) == 0:
        shape = (0, n_images)
        labels = torch.zeros(shape, dtype=torch.int64, device=noise.device)
        return Separated(noise.new_zeros(*shape, weight.shape[1]), noise.new_zeros(shape), labels)
    # Each leak in units of its own size: squares of tiny or huge entries would be zero or infinite.
    unit = torch.linalg.vector_norm(weight_gradient, ord=torch.inf, dim=(1, 2)).clamp_min(1e-300)
    noise = noise / unit
    joined = torch.cat([weight_gradient, bias_gradient.unsqueeze(2)], dim=2) / unit[:, None, None]
    values, vectors = torch.linalg.eigh(joined @ joined.mT)
    sizes = values[:, -n_images:].clamp_min(0).sqrt().clamp_min(1e-300)
    left = vectors[:, :, -n_images:]
    basis = (left.mT @ joined) / sizes.unsqueeze(2)  # (B, N, features + 1)
    labels = labels_of_batch(bias_gradient, typical.probabilities, n_images)
    n_entries = joined.shape[2]
    whitened = Problem(
        gradient=left * sizes.unsqueeze(1),
        unit=unit.unsqueeze(1),
        logits=torch.cat([weight, bias.unsqueeze(1)], dim=1) @ basis.mT,
        ones=basis[:, :, -1],
        labels=torch.nn.functional.one_hot(labels, len(bias)).to(joined),
        mean=basis @ torch.cat([typical.inputs, typical.inputs.new_ones(1)]),
        weights=1 / torch.maximum(sizes, (noise * n_entries**0.5).unsqueeze(1)),
        doubt=torch.zeros_like(noise).unsqueeze(1),
    )
    # All entries of the gradient have the same noise, and inputs are near the typical ones.
    likely = whitened._replace(
        weights=(1 / noise).unsqueeze(1).expand_as(sizes),
        doubt=(1 / typical.spread.clamp_min(1e-300)).expand_as(noise).unsqueeze(1),
    )
    # A direction that is weaker than noise is noise: of all the features, not of the classes alone.
    by_noise = len(bias) + n_entries * (n_entries * (noise.unsqueeze(1) / sizes).square()).clamp_max(1)
    leaks = _Leaks(whitened, likely, labels, bias_gradient, by_noise.sum(dim=1))
    found, cost, in_valley = leaks.solve(first_order(whitened, labels, bias_gradient, _MOVED[0]))
    leaks = _exchange_labels(leaks, found, cost, typical.probabilities)
    if equations * unknowns <= _MOST_TO_TURN:
        _search_again(leaks, found, cost, in_valley)
    # Errors of the space itself: those of a singular vector are the noise over its singular value.
    outside = noise.square().unsqueeze(1) * (found / sizes.unsqueeze(1)).square().sum(dim=2)
    variance = _variance(leaks.likely, found) / n_entries + outside
    return Separated((found @ basis)[:, :, :-1], variance, leaks.labels)


class _Leaks(NamedTuple):
    """Leaks whose images are looked for.

    Attributes:
        whitened: least squares in which all directions count alike, however weak.
        likely: by likelihood, with typical inputs as prior.
        labels: ``(B, N)``, ascending.
        bias_gradient: ``(B, classes)``.
        by_noise: ``(B,)``, squared residual of ``likely``, without the prior, that noise leaves.
    """

    whitened: Problem
    likely: Problem
    labels: Tensor
    bias_gradient: Tensor
    by_noise: Tensor

    def of(self, which: Tensor) -> "_Leaks":
        """Some of them."""
        problems = (self.whitened.of(which), self.likely.of(which))
        return _Leaks(*problems, self.labels[which], self.bias_gradient[which], self.by_noise[which])

    def with_labels(self, labels: Tensor) -> "_Leaks":
        """The same with other labels ``(B, N)``."""
        hot = torch.nn.functional.one_hot(labels, self.bias_gradient.shape[1]).to(self.bias_gradient)
        whitened, likely = (problem._replace(labels=hot) for problem in (self.whitened, self.likely))
        return self._replace(whitened=whitened, likely=likely, labels=labels)

    def solve(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates ``(B, N, N)`` that are likely, their squared residual ``(B,)``, whether they lie in a valley."""
        there, whitened_cost = search(self.whitened, start)
        return *search(self.likely, there), whitened_cost <= _IN_VALLEY

    def arrived(self, found: Tensor) -> Tensor:
        """``(B,)``: whether coordinates explain the gradient."""
        without_prior = self.likely._replace(doubt=torch.zeros_like(self.likely.doubt))
        explained = without_prior.residual(found).square().sum(dim=1) <= _EXPLAINED * self.by_noise
        # Weights that were fitted are less exact than float64.
        return explained | (self.whitened.residual(found).square().sum(dim=1) <= _EXACT)


def _exchange_labels(leaks: _Leaks, found: Tensor, cost: Tensor, probabilities: Tensor) -> _Leaks:
    """Try other labels where those read off lead to no images; overwrites what was found and its cost where they do."""
    left_over = _not_arrived(leaks, found)
    read_off = leaks.labels[left_over]
    sets = next_labels_of_batch(leaks.bias_gradient[left_over], probabilities, read_off, _OTHER_LABELS)
    doubtful = (sets != read_off.unsqueeze(1)).flatten(1).any(dim=1)
    left_over, sets = left_over[doubtful], sets[doubtful]
    if len(left_over) == 0:
        return leaks
    n_sets = sets.shape[1]
    tried = leaks.of(left_over.repeat_interleave(n_sets)).with_labels(sets.flatten(0, 1))
    each, its_cost, _ = tried.solve(first_order(tried.whitened, tried.labels, tried.bias_gradient, _MOVED[0]))
    # Wrong labels may come nearer, too; where there is no noise, only right ones arrive.
    chosen, its_cost, which = nearest(n_sets, each, torch.where(tried.arrived(each), its_cost, torch.inf))
    gained = torch.isfinite(its_cost)
    found[left_over[gained]], cost[left_over[gained]] = chosen[gained], its_cost[gained]
    labels = sets[gained, which[gained]]
    return leaks.with_labels(leaks.labels.index_copy(0, left_over[gained], labels))


def _search_again(leaks: _Leaks, found: Tensor, cost: Tensor, in_valley: Tensor) -> None:
    """Search along the valleys where searches have ended too early, and from further starts.

    Overwrites what was found, and its cost.
    """
    left_over = _not_arrived(leaks, found)
    turns = in_valley & can_turn(leaks.labels)
    for number, moved in enumerate(_MOVED):
        if number > 0:
            part = leaks.of(left_over)
            start = first_order(part.whitened, part.labels, part.bias_gradient, moved, salt=number)
            there, its_cost, _ = part.solve(start)
            _keep_nearest(found, cost, left_over, (there, its_cost))
        if len(turning := left_over[turns[left_over]]):
            starts = turned(found[turning], leaks.labels[turning], _TURNS, salt=number).flatten(0, 1)
            # All at once: a search takes as long for many as for few.
            _keep_nearest(found, cost, turning, search(leaks.likely.of(turning.repeat_interleave(_TURNS)), starts))
        left_over = left_over[_not_arrived(leaks.of(left_over), found[left_over])]
        if len(left_over) == 0:
            return


def _not_arrived(leaks: _Leaks, found: Tensor) -> Tensor:
    return (~leaks.arrived(found)).nonzero().squeeze(1)


def _keep_nearest(found: Tensor, cost: Tensor, which: Tensor, searched: tuple[Tensor, Tensor]) -> None:
    """Of as many searches for each of some leaks, put in the one that came nearest, where it is nearer than before."""
    chosen, its_cost, _ = nearest(len(searched[1]) // len(which), *searched)
    gained = its_cost < cost[which]
    found[which[gained]], cost[which[gained]] = chosen[gained], its_cost[gained]


def _variance(problem: Problem, found: Tensor) -> Tensor:
    """``(B, N)``: summed variance of each image's coordinates, where residuals are no larger than noise explains."""
    n = found.shape[1]
    jacobian, residual = problem.jacobian(found), problem.residual(found)
    normal = jacobian.mT @ jacobian
    scale = normal.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-300)
    scaled = normal / scale.unsqueeze(1) / scale.unsqueeze(2)
    inverse, failed = torch.linalg.inv_ex(scaled + 1e-14 * torch.eye(n * n, dtype=found.dtype, device=found.device))
    own = inverse.diagonal(dim1=1, dim2=2) / scale.square()
    excess = (residual.square().sum(dim=1) / (residual.shape[1] - n * n)).clamp_min(1)
    variance = own.view(-1, n, n).sum(dim=2) * excess.unsqueeze(1)
    return torch.where(failed.unsqueeze(1) == 0, variance, torch.inf)
