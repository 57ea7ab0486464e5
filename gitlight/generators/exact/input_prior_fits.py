"""The fits of `InputPrior`: regressions from most public images, and what they and the equations miss of the others."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gitlight.architecture import IMAGE
from gitlight.data.pair import Gradients
from gitlight.generators.exact.forward import computable, forward_values
from gitlight.generators.exact.input_priors import InputPrior
from gitlight.generators.exact.inversion import Inversion
from gitlight.generators.exact.rule import Estimate
from gitlight.generators.exact.status import Status

_LEAST_SPREAD = 1e-12
"""Standard deviation of an unknown beforehand, over the size of inputs, where the output leaves nothing open."""

_ONE_IN = 8
"""Share of the public images, by number, that no regression is made from: on them is measured what it leaves open."""

_LARGEST_MISFIT = 0.3
"""Of a layer's equations, beyond which nothing is made of them."""

_LARGEST_ERROR = 0.1
"""Variance of a true input that gradients give, over its own variance, up to which it is taken for true."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Seen:
    """Of single public images.

    Attributes:
        which: their positions among the leaks given.
        output: the layer's, where the walk finds it.
        inputs: the true one.
        delta: the one that the walk finds.
        noise: standard deviation of its entries' error.
    """

    which: Tensor
    output: Estimate | None
    inputs: Tensor
    delta: Tensor
    noise: Tensor


class RegressionFit:
    """The `PairFit` of all priors' regressions, on single images."""

    def __init__(self, inversion: Inversion, priors: Mapping[str, InputPrior]) -> None:
        """Args: the inversion, all its weights fitted; layer's name → its prior."""
        self._inversion, self._priors = inversion, priors

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        found = _of_single_images(self._inversion, self._priors, gradients, images, numbers % _ONE_IN != 0)
        for name, seen in found.items():
            output = None if seen.output is None else seen.output.value
            self._priors[name].add(output, seen.inputs, numbers[seen.which])

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return [total for prior in self._priors.values() for total in prior.sums()]

    def finish(self) -> None:
        """Solve them."""
        for prior in self._priors.values():
            prior.solve()


class SpreadFit:
    """The `PairFit` of what regressions leave open of images that they were not made from."""

    def __init__(self, inversion: Inversion, priors: Mapping[str, InputPrior]) -> None:
        """Args: the inversion, all its weights fitted; layer's name → its prior, the regression fitted."""
        self._inversion, self._priors = inversion, priors
        self._sums: dict[str, list[Tensor]] = {}
        for name, prior in priors.items():
            products = torch.zeros_like(prior.factor)
            self._sums[name] = [products, *products.new_zeros(4).unbind()]

    def update(self, gradients: Gradients, images: Tensor, numbers: Tensor) -> None:
        """Add a batch of pairs."""
        seen = _of_single_images(self._inversion, self._priors, gradients, images, numbers % _ONE_IN == 0)
        for name, its in seen.items():
            prior, (products, squares, count, missing, leaked) = self._priors[name], self._sums[name]
            if not prior.usable:
                continue
            left = prior.rule.columns(its.inputs - prior(its.output, len(its.inputs)).mean)
            left = left.transpose(0, 1).flatten(1, 2)  # (n_blocks, images · columns, column_size)
            products += left.mT @ left
            squares += its.inputs.square().mean() * left.shape[1]
            count += left.shape[1]
            assert prior.rule.weight is not None
            gradient = gradients[prior.rule.weight][its.which].double()
            leaked += gradient.square().sum()
            gradient -= prior.rule.weight_gradient(its.inputs, its.delta)
            missing += gradient.square().sum() - its.noise.square().sum() * gradient[:1].numel()

    def sums(self) -> Sequence[Tensor]:
        """What is added up over devices."""
        return [total for name in self._sums for total in self._sums[name]]

    def finish(self) -> None:
        """Factor the covariances."""
        for name, (products, squares, count, missing, leaked) in self._sums.items():
            covariance = products / count.clamp_min(1)
            diagonal = covariance.diagonal(dim1=1, dim2=2)
            # Fewer images than dimensions leave directions without any variance, in which a new image still may vary.
            diagonal += 0.01 * diagonal.mean() + _LEAST_SPREAD**2 * squares / count.clamp_min(1) + 1e-300
            prior = self._priors[name]
            prior.factor.copy_(torch.linalg.cholesky(covariance))
            prior.misfit.copy_((missing.clamp_min(0) / leaked.clamp_min(1e-300)).sqrt())
            prior.usable.copy_(prior.usable & (count > 0) & (prior.misfit < _LARGEST_MISFIT))
            if not prior.usable:
                why = f"miss {float(prior.misfit):.0%} of the gradients" if count else "hold for none"
                log.warning(
                    "client batches: nothing is made of the gradient of %s, nor of layers below it: its equations, by "
                    "the weights fitted, %s of public images that could be used. More pairs may help: "
                    "data.n_public_images.",
                    prior.rule.layer.place,
                    why,
                )
        self._sums = {}


def _of_single_images(
    inversion: Inversion, priors: Mapping[str, InputPrior], gradients: Gradients, images: Tensor, wanted: Tensor
) -> dict[str, _Seen]:
    """Name of each layer with a prior → what is seen of it in usable leaks, of those for which ``wanted`` holds."""
    architecture, weights = inversion.architecture, inversion.weights()
    inputs_of = {name: prior.rule.layer.inputs[0] for name, prior in priors.items()}
    # A first layer's gradient may be most of a leak, and its input is the image.
    plan = inversion.current_plan().up_to({*priors, *inputs_of.values()} - {IMAGE}, priors)
    leaks = inversion.usable(gradients, plan)
    leaks = leaks.where(wanted[leaks.which])
    if not leaks.n:
        return {}
    found = inversion.find(leaks, plan)
    truths = {IMAGE: images[leaks.which, 0].double()}
    if set(inputs_of.values()) & computable(architecture, weights) - {IMAGE}:
        truths = forward_values(architecture, images[leaks.which, 0], weights)
    seen = {}
    for name, below in inputs_of.items():
        usable = found.status < Status.ROUNDED
        if below in truths:
            inputs = truths[below]
        else:
            inputs, variance = found.values[below].value, found.values[below].variance
            error = variance.expand_as(inputs).flatten(1).mean(dim=1)
            usable = usable & (error < _LARGEST_ERROR * inputs.flatten(1).var(dim=1))
        usable = usable & torch.isfinite(inputs.flatten(1)).all(dim=1)
        if not usable.any():
            continue
        output = found.values.get(name)
        seen[name] = _Seen(
            leaks.which[usable],
            None if output is None else Estimate(output.value[usable], output.value.new_zeros(())),
            inputs[usable],
            found.deltas[name][usable],
            leaks.noise[usable],
        )
    return seen
