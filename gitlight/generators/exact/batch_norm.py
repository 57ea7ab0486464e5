"""The inverse rule of batch normalisation in evaluation mode: an affine map of each channel."""

from torch import Tensor

from gitlight.architecture import Layer
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.entrywise import EntrywiseAffineRule
from gitlight.generators.exact.rule import Weights, register_rule


@register_rule("batch_norm")
class BatchNormRule(EntrywiseAffineRule):
    """``z = γ (x − μ)/√(v + ε) + β`` with running mean ``μ`` and variance ``v``: invertible where all four are known.

    The running statistics are buffers: no gradient tells them, and an attacker who knows the architecture alone has to
    know them from elsewhere (a model that was never trained has ``μ = 0``, ``v = 1``).
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        if layer.arguments["training"]:
            raise ArchitectureError(
                f"{layer.place} normalises by the batch that it is given, which ties its examples together: no rule "
                "inverts that. In evaluation mode, with running statistics, there is one."
            )
        self._epsilon = float(layer.arguments["eps"])
        self.loses = "the scale of each channel, unless its running statistics are known"

    def affine(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """``s`` and ``β − s μ``, each ``(C, 1, …)``.

        Args:
            weights: must hold the running statistics, and ``γ`` and ``β`` where the layer has them.

        Raises:
            KeyError: one of them is not known.
        """
        layer = self.layer
        names = {**layer.parameters, **layer.constants}
        mean, variance = weights[names["running_mean"]], weights[names["running_var"]]
        scale = (variance + self._epsilon).rsqrt()
        if "weight" in names:
            scale = scale * weights[names["weight"]]
        shift = -scale * mean
        if "bias" in names:
            shift = shift + weights[names["bias"]]
        shape = (-1, *[1] * (len(layer.output_shape) - 1))
        return scale.view(shape), shift.view(shape)
