"""`ClientBatchWalker`: the walk for several images of one leak, each of which has its own ``δ``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gitlight.architecture import Architecture
from gitlight.data.pair import Gradients
from gitlight.generators.exact.affine import AffineRule
from gitlight.generators.exact.input_priors import Expected, InputPrior, identity_factor
from gitlight.generators.exact.joint import solve_jointly
from gitlight.generators.exact.plan import Action
from gitlight.generators.exact.rule import Estimate, InverseRule, Weights
from gitlight.generators.exact.solvability import Do
from gitlight.generators.exact.walk import Walker


class ClientBatchWalker(Walker):
    """Starts from each image's input of the last layer; values and ``δ`` are ``(B · N, …)``, image by image."""

    def __init__(
        self,
        architecture: Architecture,
        rules: Mapping[str, InverseRule],
        gradients: Gradients,
        noise: Tensor,
        weights: Weights,
        priors: Mapping[str, InputPrior],
        inputs: Estimate,
        labels: Tensor,
    ) -> None:
        """Start.

        Args:
            architecture: the leaked model's.
            rules: of all its layers.
            gradients: of ``B`` leaks, finite and not zero, in float64.
            noise: ``(B,)``, standard deviation of the error of a gradient's entries, above zero.
            weights: estimates of the leaked parameters, float64.
            priors: name of a layer → what is known beforehand of its input; without one, nothing but a size of one.
            inputs: of the last layer, ``(B, N, features)``; the variance in a shape that broadcasts.
            labels: ``(B, N)`` int64.
        """
        self._n_leaks, self._n_images = labels.shape
        super().__init__(
            architecture, rules, gradients, noise.repeat_interleave(self._n_images), weights, {}, torch.float64
        )
        self._noise_of_leak, self._labels, self._input_priors = noise, labels.flatten(), priors
        variance = inputs.variance.expand_as(inputs.value).flatten(0, 1)
        self._last = Estimate(inputs.value.flatten(0, 1), variance)

    def is_beyond(self, action: Action) -> bool:
        """Whether an action solves equations that did not hold for public images."""
        prior = self._input_priors.get(action.layer.name)
        return action.do is Do.SOLVE and prior is not None and not bool(prior.usable)

    def reveal(self, action: Action) -> None:
        """``δ = (softmax(W a + b) − y) / N`` of the last layer, and what errors of ``a`` make of it."""
        layer, rule = action.layer, self._rules[action.layer.name]
        assert isinstance(rule, AffineRule)
        assert rule.weight is not None
        weight, bias = self._weights[rule.weight], rule.bias_of(self._weights)
        value, spread = self._last.value, self._last.variance.sqrt()

        def probabilities(inputs: Tensor) -> Tensor:
            return torch.softmax(inputs @ weight.T + bias, dim=-1)

        expected = probabilities(value)
        moved = probabilities(value.unsqueeze(1) + self.samples.normal(value) * spread.unsqueeze(1))
        delta = (expected - torch.nn.functional.one_hot(self._labels, expected.shape[1])) / self._n_images
        self.keep_delta(layer.name, delta, (moved - expected.unsqueeze(1)) / self._n_images)

    def solve(self, action: Action) -> None:
        """An affine layer's inputs, all images' at once."""
        layer, rule = action.layer, self._rules[action.layer.name]
        below = layer.inputs[0]
        if layer.name == self._architecture.output:
            shape = (len(self._last.value), *layer.input_shape)
            self.values[below] = Estimate(self._last.value.view(shape), self._last.variance.view(shape))
            return
        assert isinstance(rule, AffineRule)
        assert rule.weight is not None
        prior, output = self._input_priors.get(layer.name), self.values.get(layer.name)
        delta = self.deltas[layer.name]
        if prior is None:
            expected = Expected(delta.new_zeros(len(delta), *layer.input_shape), delta.new_ones(len(delta)))
            factor, misfit = identity_factor(rule).to(delta), delta.new_zeros(())
        else:
            if output is not None:
                output = self.values[layer.name] = prior.trusted(output)
            expected, factor, misfit = prior(output, len(delta)), prior.factor, prior.misfit
        apart = (self._n_leaks, self._n_images)
        found = solve_jointly(
            rule,
            delta.unflatten(0, apart),
            self.errors[layer.name].unflatten(0, apart),
            self._gradients[rule.weight],
            self._noise_of_leak,
            expected.mean.unflatten(0, apart),
            factor,
            expected.size.view(apart),
            misfit,
        )
        self.values[below] = Estimate(found.value.flatten(0, 1), found.variance.flatten(0, 1))
