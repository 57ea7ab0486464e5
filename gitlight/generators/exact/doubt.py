"""Which images that a walk found are not what the equations say, or not all that they leave open."""

import torch
from torch import Tensor

from gitlight.architecture import IMAGE, Architecture
from gitlight.data.pair import as_rows
from gitlight.generators.exact.forward import gradient_mismatch
from gitlight.generators.exact.labels import labels_from_bias_gradient
from gitlight.generators.exact.leaks import Leaks
from gitlight.generators.exact.plan import Plan
from gitlight.generators.exact.rule import Estimate, Weights
from gitlight.generators.exact.solvability import Known
from gitlight.generators.exact.walk import Found


def doubtful(architecture: Architecture, plan: Plan, found: Found, leaks: Leaks, weights: Weights) -> Tensor:
    """``(B,)`` bool: whose image is an estimate, whatever became of the equations above it.

    Args:
        architecture: the leaked model's.
        plan: what was carried out.
        found: what it gave, with an image.
        leaks: what it was given.
        weights: all estimates of weights that there are.
    """
    in_doubt = _open(found.values[IMAGE])
    everything = set(architecture.parameter_shapes)
    if not set(weights) == everything <= leaks.gradients.keys():
        # Nothing to compare an estimate with.
        return in_doubt | (plan.known[IMAGE] is Known.ESTIMATE)
    # The one check that no assumption enters: does the image give the leaked gradient?
    images = found.values[IMAGE].value.clamp(0, 1)
    label = labels_from_bias_gradient(found.deltas[architecture.output])
    mismatch = gradient_mismatch(architecture, images, label, leaks.gradients, weights)
    size = sum(as_rows(g).square().sum(dim=1) for g in leaks.gradients.values()) ** 0.5
    expected = leaks.noise * architecture.n_parameters**0.5 / size
    return in_doubt | ~(mismatch < 1e-3 + 10 * expected)


def _open(image: Estimate) -> Tensor:
    """``(B,)`` bool: which images have pixels of which nothing is known, as those that a first operation clips.

    A pixel that is at most zero is zero.
    """
    black = torch.zeros_like(image.value, dtype=torch.bool)
    if image.at_most is not None:
        black = image.at_most & (image.value <= 0)
    return (torch.isinf(image.variance) & ~black).flatten(1).any(dim=1)
