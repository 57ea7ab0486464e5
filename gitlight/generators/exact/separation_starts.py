"""Where searches for the images of a client batch start: from a first-order solution, or turned in a valley."""

import torch
from torch import Tensor

from gitlight.generators.exact.separation_search import Problem

_SEED = 2505


def first_order(problem: Problem, labels: Tensor, bias_gradient: Tensor, moved: float, salt: int = 0) -> Tensor:
    """Coordinates ``(B, N, N)`` as if all images had the same probabilities, moved a little at random.

    ``a_n = (Σ_i p_i,y · mean − N G_y) / images of class y``, where the sum follows from the bias gradient.

    Args:
        problem: of ``B`` leaks.
        labels: ``(B, N)``.
        bias_gradient: ``(B, classes)``.
        moved: how far, in units of the spread over the images.
        salt: other random numbers for another one.
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
    first = (summed.unsqueeze(2) * mean.unsqueeze(1) - n * rows) / same.unsqueeze(2)
    # Images with the same label would start, and stay, at their mean.
    spread = first.std(dim=1, keepdim=True).clamp_min(1e-3 * first.abs().amax(dim=(1, 2), keepdim=True))
    return first + moved * spread * _random((n, n), first, salt)


def contrasts(labels: Tensor) -> Tensor:
    """Differences between images of one label: ``(B, N, N)``, orthonormal rows, and rows of zeros.

    Of ``g`` images that share a label, ``g − 1`` rows have the mean of the first ``k`` less the next one (Helmert
    1876), as ``k`` goes from 1 to ``g − 1``.

    Args:
        labels: ``(B, N)``, in any order.
    """
    n = labels.shape[1]
    position = torch.arange(n, device=labels.device)
    before = (labels.unsqueeze(2) == labels.unsqueeze(1)) & (position < position.unsqueeze(1))
    number = before.sum(dim=2, keepdim=True).double()
    own = torch.diag_embed(number.squeeze(2))
    return torch.where(number > 0, (before.double() - own) / (number * (number + 1)).clamp_min(1).sqrt(), 0.0)


def can_turn(labels: Tensor) -> Tensor:
    """``(B,)``: whether `turned` leads anywhere else. With one difference it only exchanges the two images."""
    return contrasts(labels).any(dim=2).sum(dim=1) > 1


def turned(found: Tensor, labels: Tensor, n_starts: int, salt: int) -> Tensor:
    """Starts in the valley that a search has ended in: ``(B, n_starts, N, N)``.

    As far as probabilities depend on the image linearly, a mean gradient holds each label's mean input, and of the
    inputs ``a_n`` around these means, ``d_n``, only ``Σ_n d_n d_nᵀ``, over all labels together: it stays the same where
    the orthonormal contrasts of images with one label are turned into each other. What is of second order tells these
    states apart, and makes several minima along the valley.

    Args:
        found: ``(B, N, N)``, coordinates of a minimum.
        labels: ``(B, N)``.
        n_starts: how many.
        salt: other turns for another number; beside it, they depend on the labels alone.
    """
    rows = contrasts(labels).to(found).unsqueeze(1)
    active = rows.any(dim=3)
    both = active.unsqueeze(3) & active.unsqueeze(2)
    eye = torch.eye(found.shape[1], dtype=found.dtype, device=found.device)
    factors = torch.linalg.qr(torch.where(both, _random((n_starts, *found.shape[1:]), found, salt), eye))
    # With a positive diagonal of R, Q is drawn uniformly from all orthogonal matrices (Mezzadri 2007).
    turn = factors.Q * factors.R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return found.unsqueeze(1) + rows.mT @ ((turn - eye) @ (rows @ found.unsqueeze(1)))


def _random(shape: tuple[int, ...], like: Tensor, salt: int) -> Tensor:
    """Standard normal numbers, the same for every leak: what is made of it does not depend on the others."""
    generator = torch.Generator().manual_seed(_SEED + salt)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)
