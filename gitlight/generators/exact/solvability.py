"""How an affine layer's input is found, and how well, from what is known of its output."""

from collections.abc import Collection
from enum import StrEnum

from gitlight.architecture import IMAGE, Architecture, Layer
from gitlight.generators.exact.affine import LARGEST_STACKED, AffineRule
from gitlight.generators.exact.joint import exact_by_outputs, exact_jointly


class Known(StrEnum):
    """How well the equations tell a result of the leaked model.

    ``CLOSE``: forward equations determine it, which a regression solves for client batches.
    """

    EXACT = "exact"
    CLOSE = "close"
    PARTLY = "partly"
    ESTIMATE = "estimate"


class Do(StrEnum):
    """One step of the walk."""

    REVEAL = "reveal"
    SOLVE = "solve"
    STACK = "stack"
    BOUND = "bound"
    INVERT = "invert"
    CARRY = "carry"


def how_to_solve(
    rule: AffineRule, output: Known | None, after_relu: bool, weights: Collection[str]
) -> tuple[Do, Known]:
    """How an affine layer's input is found, ``δ`` being known, and how well."""
    with_forward = (
        rule.weight in weights
        and (rule.bias is None or rule.bias in weights)
        and output is not None
        and rule.n_inputs <= LARGEST_STACKED
    )
    if not with_forward:
        return Do.SOLVE, Known.EXACT if rule.exact else Known.ESTIMATE
    if not rule.exact and (after_relu or output is not Known.EXACT):
        return Do.BOUND, Known.ESTIMATE
    if output is Known.PARTLY:
        return Do.SOLVE, Known.EXACT
    determined = rule.exact or (output is Known.EXACT and rule.exact_with_outputs)
    return Do.STACK, Known.EXACT if determined else Known.ESTIMATE


def how_well_jointly(
    rule: AffineRule, layer: Layer, architecture: Architecture, n_images: int, output: Known | None, truth: bool
) -> Known:
    """How well the inputs of several images are found, whose ``δ`` are known.

    Args:
        rule: the layer's.
        layer: itself.
        architecture: the leaked model's.
        n_images: images per leak.
        output: how well its output is known; None: not.
        truth: whether its input is found for single images, of which a regression on outputs can be made.
    """
    if layer.name == architecture.output or exact_jointly(rule, n_images):
        return Known.EXACT
    by_outputs = output in (Known.EXACT, Known.CLOSE) and truth and exact_by_outputs(rule)
    return Known.CLOSE if by_outputs else Known.ESTIMATE


def produced_by_relu(layer: Layer, architecture: Architecture) -> bool:
    """Whether an input is known to be non-negative because it is a ReLU's output."""
    name = layer.inputs[0]
    while name != IMAGE:
        producer = architecture[name]
        if producer.kind == "relu":
            return True
        if producer.kind not in ("dropout", "flatten", "max_pool2d", "reshape", "view"):
            return False
        name = producer.inputs[0]
    return False
