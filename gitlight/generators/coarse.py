"""Coarse-GIT (Chen and Liu 2025): one learned inverse step per module of the leaked model, from the output down."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from gitlight.architecture import ELEMENTWISE, MOVES, Architecture, Layer
from gitlight.config import CoarseGeneratorConfig
from gitlight.data.pair import Gradients
from gitlight.errors import ArchitectureError
from gitlight.generators.base import Generator, PairFit
from gitlight.generators.scaling import GradientScaling
from gitlight.generators.width import width_for_budget

WITH_PARAMETERS = ("linear", "conv2d")
WITHOUT_PARAMETERS = (*ELEMENTWISE, *MOVES, "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d")


class CoarseGenerator(Generator):
    """``â_{m-1} = MLP_m(â_m, g_m)`` from the last module to the first; ``g_m`` are the module's own gradients.

    A module is a layer with parameters and whatever follows it up to the next (activation, pooling, flattening), found
    by walking the traced graph of the architecture; ``â_{m-1}`` has the shape of the module's input. The last module
    starts from its gradients alone. The estimates of inner activations are not compared with anything: the whole is
    trained on the images.
    """

    def __init__(self, architecture: Architecture, settings: CoarseGeneratorConfig, client_batch_size: int = 1) -> None:
        """Raises: ArchitectureError, naming a module of a kind that Coarse-GIT has no step for."""
        super().__init__(architecture, client_batch_size)
        self.scaling = GradientScaling(architecture)
        self._modules_down = modules_with_parameters(architecture)[::-1]

        def build(width: int) -> nn.ModuleList:
            steps = nn.ModuleList()
            known = 0
            for layer in self._modules_down:
                n_gradient = sum(architecture.parameter_shapes[name].numel() for name in layer.parameters.values())
                n_outputs = client_batch_size * prod(layer.input_shape)
                steps.append(_Step(known + n_gradient, width, n_outputs))
                known = n_outputs
            return steps

        width = settings.hidden_size
        if settings.parameters is not None:
            width = width_for_budget(build, settings.parameters)
        self.steps = build(width)

    def forward(self, gradients: Gradients) -> Tensor:
        """``(B, N, C, H, W)`` in [0, 1]."""
        own = self.scaling.split(self.scaling(gradients))
        estimate: list[Tensor] = []
        for layer, step in zip(self._modules_down, self.steps, strict=True):
            estimate = [step(torch.cat([*estimate, *(own[name] for name in layer.parameters.values())], dim=1))]
        return torch.sigmoid(estimate[0].float()).view(-1, *self.image_shape)

    def fits(self) -> Sequence[PairFit]:
        """The scaling's statistics."""
        return (self.scaling,)


class _Step(nn.Module):
    """One inverse step: one hidden layer."""

    def __init__(self, n_inputs: int, width: int, n_outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_inputs, width)
        self.output = nn.Linear(width, n_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.output(torch.relu(self.hidden(inputs)))
        return outputs


def modules_with_parameters(architecture: Architecture) -> list[Layer]:
    """The layers with parameters, from input to output.

    Raises:
        ArchitectureError: a module is of a kind that Coarse-GIT has no step for.
    """
    found = []
    for layer in architecture.chain():
        if layer.kind in WITH_PARAMETERS:
            found.append(layer)
        elif layer.kind not in WITHOUT_PARAMETERS:
            raise ArchitectureError(
                f"coarse has no step for {layer.place} of the leaked model. "
                f"It knows: {', '.join((*WITH_PARAMETERS, *WITHOUT_PARAMETERS))}. "
                "mlp handles every leaked model: generator.name=mlp."
            )
    if not found:
        raise ArchitectureError("The leaked model has no layer with parameters, so there is no gradient to invert.")
    return found
