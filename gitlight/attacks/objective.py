"""What an iterative attack minimises: the distance of gradients, and what images are expected to be like."""

from typing import NamedTuple

import torch
from torch import Tensor

from gitlight.architecture import Architecture
from gitlight.attacks.gradients import LeakedFunction
from gitlight.config import MatchingConfig
from gitlight.data.pair import Gradients, as_rows


class Value(NamedTuple):
    """Of one search.

    Attributes:
        distance: of the gradients.
        image_terms: all regularisers but the prior's.
    """

    distance: Tensor
    image_terms: Tensor


class Objective:
    """``distance(g(x), g) + regularisers``, for one leak; `torch.func.vmap` makes it many."""

    def __init__(self, function: LeakedFunction, settings: MatchingConfig) -> None:
        self._function, self._settings = function.with_kinks_spread(settings.kink_width or 0.0), settings

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        leak: Gradients,
        weights: Tensor,
        prior: Tensor,
        prior_weight: Tensor,
    ) -> tuple[Tensor, Value]:
        """What is minimised, and its parts.

        Args:
            images: ``(N, C, H, W)``.
            targets: ``(N, classes)``, probabilities of the labels.
            leak: the gradient that leaked, by name.
            weights: ``(parameters,)``, what each parameter's part counts.
            prior: ``(N, C, H, W)``.
            prior_weight: a number.
        """
        settings = self._settings
        distance = gradient_distance(self._function.gradient(images, targets), leak, weights, settings.objective)
        terms = torch.zeros_like(distance)
        if settings.total_variation > 0:
            terms = terms + settings.total_variation * total_variation(images)
        if settings.batch_norm_statistics > 0:
            terms = terms + settings.batch_norm_statistics * batch_norm_distance(self._function, images)
        total = distance + terms
        if settings.prior_weight > 0:
            total = total + prior_weight * (images - prior).square().mean()
        return total, Value(distance.detach(), terms.detach())


def gradient_distance(found: Gradients, leak: Gradients, weights: Tensor, kind: str) -> Tensor:
    """One minus the cosine, or the squared Euclidean distance over the leak's squared norm; a number.

    The latter is DLG's but for the leak's norm, without which nothing could be said of when a search has arrived.
    """
    pairs = [(found[name], leak[name], weight) for (name, weight) in zip(leak, weights.unbind(), strict=True)]
    if kind == "l2":
        # Over the norm before squares are taken: those of small gradients underflow.
        largest = torch.stack([theirs.abs().max() for _, theirs, _ in pairs]).max().clamp_min(1e-30)
        of_leak = sum(weight * (theirs / largest).square().sum() for _, theirs, weight in pairs)
        return torch.as_tensor(
            sum(weight * ((own - theirs) / largest).square().sum() for own, theirs, weight in pairs) / of_leak
        )
    # Half the squared distance of the normalised gradients: unlike one minus a quotient of products it keeps its digits
    # near zero, and does not underflow for gradients of 1e-10 in single precision.
    largest = torch.stack([theirs.abs().max() for _, theirs, _ in pairs]).max().clamp_min(1e-30)
    own_norm = torch.as_tensor(sum(weight * (own / largest).square().sum() for own, _, weight in pairs) + 1e-30).sqrt()
    norm = torch.as_tensor(sum(weight * (theirs / largest).square().sum() for _, theirs, weight in pairs)).sqrt()
    apart = [
        weight * (own / largest / own_norm - theirs / largest / norm).square().sum() for own, theirs, weight in pairs
    ]
    return 0.5 * torch.stack(apart).sum()


def layer_weights(architecture: Architecture, leak: Gradients, kind: str) -> Tensor:
    """``(B, parameters)``: what each parameter's part of the distance counts, in the order of ``leak``."""
    names = list(leak)
    first = leak[names[0]]
    if kind == "size":
        sizes = torch.stack([as_rows(leak[name]).square().sum(dim=1) for name in names], dim=1)
        # What a channel has set to zero says nothing, and would weigh more than all else.
        says = sizes > 1e-12 * sizes.amax(dim=1, keepdim=True)
        return torch.where(says, sizes.mean(dim=1, keepdim=True) / torch.where(says, sizes, 1.0), 0.0)
    if kind == "linear":
        order = [name for layer in architecture.layers for name in layer.parameters.values()]
        places = torch.tensor([order.index(name) for name in names], dtype=first.dtype, device=first.device)
        return (1 + places / max(1, len(order) - 1)).expand(len(first), -1)
    return first.new_ones(len(first), len(names))


def total_variation(images: Tensor) -> Tensor:
    """The mean absolute difference of vertical and of horizontal neighbours, added (Geiping et al. 2020)."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def batch_norm_distance(function: LeakedFunction, images: Tensor) -> Tensor:
    """Of the client batch's statistics to the running ones, summed over layers (Yin et al. 2021, Eq. 9)."""
    result = images.new_zeros(())
    for found in function.batch_norm_inputs(images):
        result = result + (found.mean - found.running_mean).norm() + (found.variance - found.running_variance).norm()
    return result
