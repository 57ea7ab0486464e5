"""What `ExactGenerator` takes from pairs beside the weights."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gitlight.data.pair import Gradients
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.noise import rank_one
from gitlight.generators.exact.status import Status, screen
from gitlight.generators.ridge import RidgeRegression
from gitlight.virtual_ranks import current_share

if TYPE_CHECKING:
    from gitlight.generators.exact.generator import ExactGenerator


class SecondFit:
    """The `PairFit` of the largest second singular value among single images' leaks."""

    def __init__(self, generator: "ExactGenerator") -> None:
        self._generator = generator
        self._largest: Tensor | None = None

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Look at a batch."""
        rule = self._generator.inversion.rules[self._generator.architecture.output]
        if isinstance(rule, AffineRule) and rule.weight is not None:
            good = screen(gradients) == Status.EXACT
            if bool(good.any()):
                second = rank_one(gradients[rule.weight][good]).second.max()
                its = self.sums()[0][current_share().number]
                its.copy_(torch.maximum(its, second))

    def sums(self) -> list[Tensor]:
        """The maxima, each share's in a place of its own, so that their sum holds them all."""
        if self._largest is None:
            self._largest = self._generator.largest_second.new_zeros(current_share().of)
        return [self._largest]

    def finish(self) -> None:
        """Keep the largest of all."""
        self._generator.largest_second.copy_(self.sums()[0].max())


class FallbackFit:
    """The `PairFit` of the regression that stands in where the walk does not reach the image."""

    def __init__(self, generator: "ExactGenerator", ridge: RidgeRegression) -> None:
        self._generator, self._ridge = generator, ridge

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        inversion = self._generator.inversion
        leaks = inversion.usable(gradients)
        if not leaks.n:
            return
        found = inversion.find(leaks)
        features = torch.cat([found.values[name].value.flatten(1) for name in self._generator.features], dim=1)
        self._ridge.add(features, images[leaks.which, 0].flatten(1), numbers[leaks.which])

    def sums(self) -> list[Tensor]:
        """The regression's."""
        return list(self._ridge.sums())

    def finish(self) -> None:
        """Solve the regression."""
        self._ridge.solve()
