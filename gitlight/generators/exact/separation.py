"""Telling the images of a client batch apart, by the last layer's gradient and forward equations together."""

from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.generators.exact.labels import labels_of_batch, next_labels_of_batch
from gitlight.generators.exact.separation_search import Problem, nearest, search

_ARRIVED = 1e-6
"""What the squared residual may be, in units of the directions' own sizes, for the images to be told apart."""

_JITTER, _AGAIN = 0.05, (0.3, 1.0)
"""How far a start is moved at random, in units of the spread over the images; and those of leaks that need more."""

_OTHER_LABELS = 3
"""Sets of labels that are tried where those that were read off do not lead to any images."""

_MOST_AT_ONCE = 1 << 25
"""Entries of all leaks' Jacobians at once, 256 MiB."""

_SEED = 2505


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
    ``−a_n``. Images with the same label differ by their probabilities.

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
    chunk = max(1, _MOST_AT_ONCE // (equations * unknowns * max(len(_AGAIN), _OTHER_LABELS)))
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
    problem = Problem(
        gradient=left * sizes.unsqueeze(1),
        unit=unit.unsqueeze(1),
        logits=torch.cat([weight, bias.unsqueeze(1)], dim=1) @ basis.mT,
        ones=basis[:, :, -1],
        labels=torch.nn.functional.one_hot(labels, len(bias)).to(joined),
        mean=basis @ torch.cat([typical.inputs, typical.inputs.new_ones(1)]),
        weights=1 / torch.maximum(sizes, (noise * n_entries**0.5).unsqueeze(1)),
        doubt=torch.zeros_like(noise).unsqueeze(1),
    )
    first = _first_order(problem, labels, bias_gradient)
    generator = torch.Generator().manual_seed(_SEED)
    jitter = torch.randn((1 + len(_AGAIN), *first.shape[1:]), generator=generator, dtype=torch.float64).to(first)
    spread = first.std(dim=1, keepdim=True).clamp_min(1e-3 * first.abs().amax(dim=(1, 2), keepdim=True))
    found, cost = search(problem, first + _JITTER * spread * jitter[0])
    expected = (noise.square().unsqueeze(1) * problem.weights.square()).sum(dim=1) * len(bias)
    arrived = (4 * expected).clamp_min(_ARRIVED)
    left_over = (cost > arrived).nonzero().squeeze(1)
    if len(left_over):
        # All at once: a search takes as long for many as for few.
        sizes_of_jitter = torch.tensor(_AGAIN, dtype=first.dtype, device=first.device).view(-1, 1, 1)
        starts = first[left_over].unsqueeze(1) + (sizes_of_jitter * jitter[1:]) * spread[left_over].unsqueeze(1)
        again = left_over.repeat_interleave(len(_AGAIN))
        chosen, its_cost, _ = nearest(len(_AGAIN), *search(problem.of(again), starts.flatten(0, 1)))
        gained = its_cost < cost[left_over]
        found[left_over[gained]], cost[left_over[gained]] = chosen[gained], its_cost[gained]
        left_over = (cost > arrived).nonzero().squeeze(1)
    sets = next_labels_of_batch(bias_gradient[left_over], typical.probabilities, labels[left_over], _OTHER_LABELS)
    doubtful = (sets != labels[left_over].unsqueeze(1)).flatten(1).any(dim=1)
    left_over, sets = left_over[doubtful], sets[doubtful]
    if len(left_over):
        again, its_labels = left_over.repeat_interleave(sets.shape[1]), sets.flatten(0, 1)
        tried = problem.of(again)._replace(labels=torch.nn.functional.one_hot(its_labels, len(bias)).to(joined))
        start = _first_order(tried, its_labels, bias_gradient[again]) + _JITTER * spread[again] * jitter[0]
        chosen, its_cost, which = nearest(sets.shape[1], *search(tried, start))
        # Wrong labels may come nearer, too; where there is no noise, only right ones arrive.
        gained = its_cost <= arrived[left_over]
        found[left_over[gained]], labels[left_over[gained]] = chosen[gained], sets[gained, which[gained]]
        problem = problem._replace(labels=torch.nn.functional.one_hot(labels, len(bias)).to(joined))
    # From there by likelihood: all entries of the gradient have the same noise, and inputs are near the typical ones.
    scale = noise.unsqueeze(1)
    likely = problem._replace(
        weights=(1 / scale).expand_as(problem.weights), doubt=torch.ones_like(scale) / typical.spread.clamp_min(1e-300)
    )
    found, _ = search(likely, found)
    # Errors of the space itself: those of a singular vector are the noise over its singular value.
    outside = noise.square().unsqueeze(1) * (found / sizes.unsqueeze(1)).square().sum(dim=2)
    return Separated((found @ basis)[:, :, :-1], _variance(likely, found) / n_entries + outside, labels)


def _first_order(problem: Problem, labels: Tensor, bias_gradient: Tensor) -> Tensor:
    """Coordinates, as if all images had the same probabilities.

    ``a_n = (Σ_i p_i,y · mean − N G_y) / images of class y``, where the sum follows from the bias gradient.
    """
    n = labels.shape[1]
    absent = (problem.labels.sum(dim=1) == 0).to(bias_gradient)
    # Rows of classes without an image hold the mean input, times their probability.
    total = (absent * bias_gradient).sum(dim=1, keepdim=True).clamp_min(0)
    gradient = problem.gradient * problem.unit.unsqueeze(2)
    mean = ((absent.unsqueeze(1) @ gradient).squeeze(1) + 1e-4 * problem.mean) / (total + 1e-4)
    same = (labels.unsqueeze(2) == labels.unsqueeze(1)).sum(dim=2).to(bias_gradient)
    summed = n * bias_gradient.gather(1, labels) + same
    rows = gradient.gather(1, labels.unsqueeze(2).expand(-1, -1, n))
    return (summed.unsqueeze(2) * mean.unsqueeze(1) - n * rows) / same.unsqueeze(2)


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
