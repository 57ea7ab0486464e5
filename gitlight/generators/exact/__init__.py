"""Closed-form inversion: one inverse rule per kind of operation, and the walk that applies them.

Importing this package registers the rules that come with gitlight; `register_rule` adds one.
"""

from gitlight.generators.exact import (  # noqa: F401  (each registers its rule)
    activations,
    addition,
    attention,
    batch_norm,
    clipped,
    concatenation,
    convolution,
    entrywise,
    exponential,
    layer_norm,
    linear,
    moves,
    one_minimum,
    pooling,
)
from gitlight.generators.exact.rule import Estimate, InverseRule, known_kinds, register_rule, rule_for

__all__ = ["Estimate", "InverseRule", "known_kinds", "register_rule", "rule_for"]
