"""The inverse rule of layer normalisation."""

from gitlight.generators.exact.rule import InverseRule, register_rule


@register_rule("layer_norm")
class LayerNormRule(InverseRule):
    """``z = γ (x − mean x)/√(var x + ε) + β``: mean and scale of each vector are lost.

    ``δ`` is carried by the chain rule where the input is known from elsewhere.
    """

    carry_needs = "input"
    loses = "mean and scale of every vector it normalises: two numbers a token"
