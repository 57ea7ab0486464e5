"""What runs the steps of a traced network, and the tensors that it runs them with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gitlight.gradients.steps import Step


@dataclass(frozen=True)
class Prepared:
    """A network's tensors for one call: everything that does not depend on images.

    Attributes:
        externals: the tensors of the graph, detached.
        folded: step number → further values of a convolution that has absorbed its norm.
        roots: tensors computed from leaked parameters, with their autograd graphs.
        leaves: the leaked parameters at the ends of those graphs.
    """

    externals: Mapping[str, Tensor]
    folded: Mapping[int, Mapping[str, Tensor]]
    roots: Mapping[str, Tensor]
    leaves: Mapping[str, Tensor]


class Recorder:
    """Runs the steps of a traced network."""

    def __init__(self, steps: tuple[Step, ...], prepared: Prepared) -> None:
        self._steps = steps
        self.prepared = prepared

    def values(self, number: int, computed: tuple[Any, ...]) -> dict[str, Any]:
        """The arguments of a step by name.

        Args:
            number: the step's.
            computed: those of its tensors that depend on images, in their order.
        """
        step, left = self._steps[number], iter(computed)
        externals = self.prepared.externals
        values = step.bind([next(left) if name is None else externals[name] for name in step.sources])
        values.update(self.prepared.folded.get(number, {}))
        return values
