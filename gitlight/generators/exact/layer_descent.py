"""Descent on the equations of all layers at once: trained weights that converge to the leaked ones."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gitlight.architecture import IMAGE
from gitlight.data.pair import Gradients
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.fits import FitStep, Way
from gitlight.generators.exact.layer_equations import (
    LayerEquations,
    Walked,
    equations_of,
    evenly_weighed,
    usable_equations,
)
from gitlight.generators.exact.plan import plan_walk
from gitlight.generators.exact.walk import walk
from gitlight.virtual_ranks import fanned_out, n_processes, sum_here, sum_over_processes

if TYPE_CHECKING:
    from gitlight.generators.exact.inversion import Inversion

_MEMORY = 0.5
"""Share of the moments of a layer's inputs that a batch keeps. Inputs above the first layer change with the weights."""

_MISFIT_MEMORY = 0.5

_DECAY = 0.5
"""By which the damping falls from batch to batch. A layer's inputs vary most in a few directions and a million times
less in others: those of little variance must wait until the others are fitted, or their weights are led astray."""

_LEAST_DAMPING = 1e-11
"""Over the mean variance of an input."""


class LayerDescent(nn.Module):
    """Mean squared residuals of every layer's equations, which vanish for the leaked weights and for no others.

    The equations are those that `gitlight.generators.exact.fits` solves one layer after the other, for the weights of
    this moment: what the layers above give away of a layer's output, against what its weight makes of its input. Each
    is linear in its own layer's weight; the other weights that enter it are taken as given.

    Activations are so correlated that plain descent does not arrive (docs/inversion.md). The gradient is therefore
    preconditioned by the inverse second moments of the layer's inputs, kept over batches as in K-FAC (Martens and
    Grosse 2015, §5), with a damping that falls from batch to batch, as in Levenberg–Marquardt. Optimise with plain
    gradient descent at a learning rate of nearly one, with all pairs in one batch, of more pairs than the widest layer
    has inputs: what a smaller batch does not determine is moved at random, and a preconditioner magnifies that.
    """

    def __init__(self, inversion: "Inversion") -> None:
        """Prepare descent for an inversion's steps.

        Raises:
            ArchitectureError: for some weight that the inversion needs there are no such equations.
        """
        super().__init__()
        if inversion.unreachable:
            raise ArchitectureError(
                f"generator.objective: layers needs equations for every weight, and no layer gives any for those of "
                f"{', '.join(inversion.unreachable)}. generator.objective=image trains on the image's error alone."
            )
        self._steps = inversion.steps
        shapes = inversion.architecture.parameter_shapes
        trained = {name for step in self._steps for name in step.layer.parameters.values()}
        self.plan = plan_walk(
            inversion.architecture, inversion.rules, trained, 1, stacked=False, through_estimates=True
        )
        for number, step in enumerate(self._steps):
            outputs, *inputs = shapes[step.layer.parameters["weight"]]
            size = torch.Size(inputs).numel() + (step.way is not Way.CONSERVED or "bias" in step.layer.parameters)
            sets = outputs if step.way is Way.CONSERVED else 1
            self.register_buffer(f"moments{number}", torch.zeros(sets, size, size, dtype=torch.float64))
        self.misfits: Tensor
        self.register_buffer("misfits", torch.ones(len(self._steps), dtype=torch.float64))
        self.taken: Tensor
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def forward(
        self, inversion: "Inversion", shares: Sequence[tuple[Gradients, Tensor]], trained: Mapping[str, Tensor]
    ) -> Tensor:
        """The loss of a batch of pairs; one batch is counted.

        Args:
            inversion: holds the values of the trained weights as its estimates.
            shares: of ``B`` leaks each, gradients and images ``(B, 1, C, H, W)``.
            trained: parameter name → the weight that is trained.
        """
        with torch.no_grad():
            walked = [self._walked(inversion, gradients, images) for gradients, images in shares]
        loss = walked[0].leaks.noise.new_zeros(())
        for number, step in enumerate(self._steps):
            with torch.no_grad():
                equations = self._equations(inversion, walked, number)
            loss = loss + self._residual(number, step, equations, trained)
        self.taken += 1
        return loss

    def _equations(self, inversion: "Inversion", shares: Sequence[Walked], number: int) -> list[LayerEquations]:
        """Each share's. What is decided of them is decided for all shares, on this device and on others."""
        step, moments = self._steps[number], getattr(self, f"moments{number}")
        nothing = moments.new_zeros(0, inversion.architecture.parameter_shapes[step.layer.parameters["weight"]][0])
        made: Sequence[tuple[Tensor, Tensor, Tensor]] = [
            equations_of(inversion, walked, step)
            if walked.leaks.n
            else (moments.new_zeros(len(moments), 0, moments.shape[1]), nothing, nothing)
            for walked in shares
        ]
        if step.way is Way.LOGITS:
            return usable_equations(evenly_weighed(made), up_to_constant=True)
        return usable_equations(made)

    def _walked(self, inversion: "Inversion", gradients: Gradients, images: Tensor) -> Walked:
        leaks = inversion.usable(gradients)
        if not leaks.n:
            return Walked(leaks, inversion.find(leaks), images[:0, 0])
        found = walk(
            inversion.architecture,
            inversion.rules,
            self.plan,
            leaks.gradients,
            leaks.noise,
            inversion.weights(),
            priors={},
            dtype=leaks.dtype,
            until=lambda action: action.layer.inputs[:1] == (IMAGE,),  # the image is public, and need not be solved
        )
        return Walked(leaks, found, images[leaks.which, 0])

    def _residual(
        self, number: int, step: FitStep, shares: Sequence[LayerEquations], trained: Mapping[str, Tensor]
    ) -> Tensor:
        size = shares[0].rows.shape[2]
        # Outputs that share rows share moments. The largest weight is taken, or a step would overshoot for some.
        own = [weights.T if len(rows) > 1 else weights.amax(dim=1).unsqueeze(0) for rows, _, weights, _ in shares]
        total = sum_over_processes([its.mean(dim=0).sum() for its in own])
        moments: Tensor = getattr(self, f"moments{number}")
        batch = sum_over_processes(
            [
                (its.rows * counts.unsqueeze(2)).transpose(1, 2) @ its.rows
                for its, counts in zip(shares, own, strict=True)
            ]
        ) / total.clamp_min(1e-300)
        moments.mul_(_MEMORY).add_(batch, alpha=1 - _MEMORY)
        # Equations that rest on other trained weights are trusted no further than those weights' own hold.
        falling = max(_DECAY ** int(self.taken), float(self.misfits[:number].sum()))
        damping = max(_LEAST_DAMPING, size * falling)
        lasting = moments / (1 - _MEMORY ** (int(self.taken) + 1))
        # With half of the weight on this batch, no direction that it has is overshot, however new it is.
        inverse = _damped_inverse((lasting + batch) / 2, damping)
        matrices = [_Preconditioned.apply(matrix, inverse) for matrix in _matrices(step, size, trained, len(shares))]
        residuals = [its.residual(matrix) for its, matrix in zip(shares, matrices, strict=True)]
        self._note_misfit(number, residuals, shares)
        squares = [(its.weights * residual.square()).sum() for its, residual in zip(shares, residuals, strict=True)]
        # Averaged over devices, this is the mean over the equations of all of them.
        return 0.5 * n_processes() * sum_here(squares) / total.clamp_min(1e-300)

    def _note_misfit(self, number: int, residuals: Sequence[Tensor], shares: Sequence[LayerEquations]) -> None:
        """Keep the share of the targets' variance that a layer leaves unexplained."""
        with torch.no_grad():
            count = sum_over_processes([its.weights.sum() for its in shares]).clamp_min(1e-300)
            mean = sum_over_processes([(its.weights * its.targets).sum() for its in shares]) / count
            variance = (
                sum_over_processes([(its.weights * (its.targets - mean).square()).sum() for its in shares]) / count
            )
            squares = [(its.weights * residual.square()).sum() for its, residual in zip(shares, residuals, strict=True)]
            unexplained = sum_over_processes(squares) / count / variance.clamp_min(1e-300)
            unexplained = torch.where(count > 1e-300, unexplained.clamp_max(1), 1.0)
            self.misfits[number] += (1 - _MISFIT_MEMORY) * (unexplained - self.misfits[number])


class _Preconditioned(torch.autograd.Function):
    """The same weights; their gradient is multiplied by the inverse second moments of what they are multiplied by."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return matrix.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        return (upstream[0].unsqueeze(1) @ inverse).squeeze(1), None


def _matrices(step: FitStep, size: int, trained: Mapping[str, Tensor], n_shares: int) -> list[Tensor]:
    """A step's weight ``(outputs, n)``, with its bias or without, for each share."""
    names = step.layer.parameters
    weights = fanned_out(trained[names["weight"]], n_shares)
    matrices = [weight.flatten(1) for weight in weights]
    if size == matrices[0].shape[1]:
        return matrices
    if "bias" in names:
        biases = fanned_out(trained[names["bias"]], n_shares)
    else:
        biases = [matrix.new_zeros(len(matrix)) for matrix in matrices]
    return [torch.cat([matrix, bias.unsqueeze(1)], dim=1) for matrix, bias in zip(matrices, biases, strict=True)]


def _damped_inverse(moments: Tensor, damping: float) -> Tensor:
    """Of ``(sets, n, n)``, with ``damping`` times the mean of its diagonal added to that.

    Without scaling the inputs first: as it is, each step shortens the error of every eigenvector of the moments, and so
    the distance to the solution. Inputs scaled to one size shorten a distance in which those of small size count for
    nothing, and led their weights astray before they brought them back (LeNet's last layer: 3.7 times as far as at the
    start).
    """
    diagonal = moments.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(dim=1).clamp_min(1e-300)
    damped = moments.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping * level.unsqueeze(1))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool((failed > 0).any()):  # rounding of a moment beyond the damping
        damped.diagonal(dim1=1, dim2=2).add_(1e-8 * level.unsqueeze(1))
        factor = torch.linalg.cholesky(damped)
    return torch.cholesky_inverse(factor)
