"""The inverse rule of scaled dot-product attention, as far as it goes."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gitlight.generators.exact.rule import Estimate, InverseRule, Weights, register_rule


@register_rule("scaled_dot_product_attention")
class AttentionRule(InverseRule):
    """``softmax(Q Kᵀ/√d) V``: one output, three unknown inputs. None follows from the output.

    What leaks is around it: the output projection's input is exact (it is linear in tokens, `LinearRule`), and where
    queries, keys and values are known, ``δ`` passes by the chain rule.
    """

    carry_needs = "input"
    loses = "queries, keys and values: three unknown matrices for one known"

    def carry(
        self,
        delta: Tensor,
        position: int,
        inputs: Sequence[Estimate | None],
        output: Estimate | None,
        weights: Weights,
    ) -> Tensor:
        """The chain rule; on plain matrix products, as vmap has no rule for the fused kernel of CPUs."""
        with sdpa_kernel(SDPBackend.MATH):
            return super().carry(delta, position, inputs, output, weights)
