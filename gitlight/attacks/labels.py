"""Labels from a leak's last layer, for client batches of any size."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gitlight.architecture import Architecture, Layer
from gitlight.data.pair import GradientPair, Gradients
from gitlight.data.pair_datamodule import GradientPairDataModule
from gitlight.errors import ConfigError
from gitlight.generators.exact.labels import NO_LABEL, below_rescaling, labels_of_batch

_N_PUBLIC = 64
"""Public images whose pairs tell what probabilities to expect."""


class LabelReader:
    """Reads the labels of leaks off the last layer's gradient, in ascending order.

    With cross-entropy the last layer's bias gradient is ``mean_i (softmax(z_i) − y_i)``. For one image the label's
    entry is the only negative one (Zhao et al. 2020). For more, each image of a class lowers that class's entry by
    ``1/N`` below the mean probability: the class that is farthest below is taken, ``1/N`` is added there, and so on,
    ``N`` times (after Wainakh et al. 2021). Mean probabilities are those of pairs; without pairs they count as small.
    Where there is no bias, the sums over a weight gradient's rows stand for it, which have its signs where activations
    are not negative. A ``log_softmax`` or a constant temperature behind the layer makes no difference.

    Attributes:
        readable: whether there is a last linear layer's bias, or its weight, whose whole gradient leaks.
    """

    def __init__(self, architecture: Architecture, client_batch_size: int, pairs: Iterable[GradientPair] = ()) -> None:
        """Args: the leaked model's, ``N``, and pairs of client batches of ``N`` images, whose labels are known.

        Of pairs those with gradients that are not finite are left out; for single images none is looked at.
        """
        last, factor = below_rescaling(architecture)
        bias, weight = (_whole(last, role, architecture) for role in ("bias", "weight"))
        self._of_bias = bias is not None
        self.readable = bias is not None or weight is not None
        self._name = bias or weight
        self._n_images, self._factor, self._end = client_batch_size, factor, architecture[architecture.output].place
        self._size: Tensor | None = None  # of an image's worth in sums over rows, times N
        self._probabilities = torch.zeros((), dtype=torch.float64)
        if self.readable and client_batch_size > 1:
            self._learn(pairs, architecture.n_classes)

    @classmethod
    def of(cls, datamodule: GradientPairDataModule, device: torch.device) -> "LabelReader":
        """For the leaks of a datamodule, with its public pairs held out, which are made on the device."""
        n_images = datamodule.settings.client_batch_size
        pairs = datamodule.held_out_pairs(device, max(_N_PUBLIC, n_images))
        return cls(datamodule.architecture, n_images, pairs)

    def __call__(self, gradients: Gradients) -> Tensor:
        """``(B, N)`` int64: the labels of ``B`` leaks; -1 where a gradient is not finite.

        Raises:
            ConfigError: the model does not end in a linear layer whose whole gradient leaks.
        """
        if not self.readable:
            raise ConfigError(
                "attack.labels: recovered: labels are read off the gradient of a last linear layer, and the leaked "
                f"model ends in {self._end}. Give attack.labels=optimised, or attack.labels=given."
            )
        error = self._error(gradients)
        finite = torch.isfinite(error).all(dim=1, keepdim=True)
        error = torch.nan_to_num(error)
        # In units in which one image's worth is 1/N; the bias gradient has them already.
        if self._size is not None:
            error = error / self._size.to(error)
        elif not self._of_bias:
            negative = error.clamp_max(0).sum(dim=1, keepdim=True).abs().clamp_min(1e-300)
            error = error / negative
        found = labels_of_batch(error, self._probabilities.to(error), self._n_images)
        return torch.where(finite, found, NO_LABEL)

    def _error(self, gradients: Gradients) -> Tensor:
        """``(B, classes)`` float64: the bias gradient, or what stands for it."""
        assert self._name is not None
        gradient = gradients[self._name].double()
        return (gradient if self._of_bias else gradient.sum(dim=2)) / self._factor

    def _learn(self, pairs: Iterable[GradientPair], n_classes: int) -> None:
        """Mean probabilities, and without a bias how much an image is worth."""
        errors, counts = [], []
        for pair in pairs:
            error = self._error(pair.gradients)
            finite = torch.isfinite(error).all(dim=1)
            errors.append(error[finite])
            counts.append(torch.nn.functional.one_hot(pair.labels[finite], n_classes).to(error).mean(dim=1))
        if not errors or not len(error := torch.cat(errors)):
            return
        count = torch.cat(counts)
        if not self._of_bias:
            # Sums over rows are δ times a sum of activations, which is alike for all images of an untrained model.
            varied = count - count.mean(dim=0)
            size = -(error * varied).sum() / varied.square().sum().clamp_min(1e-300)
            if not size > 0:
                return
            self._size, error = size, error / size
        self._probabilities = (error + count).mean(dim=0)


def _whole(last: Layer, role: str, architecture: Architecture) -> str | None:
    """The name of a last linear layer's parameter, if its whole gradient leaks."""
    name = last.parameters.get(role) if last.kind == "linear" else None
    return None if name in architecture.sketched else name


def in_the_order_of(recovered: Tensor, labels: Tensor) -> Tensor:
    """Recovered labels ``(B, N)``, each next to an equal true one where there is one left; ``-1`` where there is none.

    >>> in_the_order_of(torch.tensor([[1, 1, 4]]), torch.tensor([[4, 2, 1]])).tolist()
    [[4, -1, 1]]
    """
    result = torch.full_like(labels, -1)
    for row, (found, true) in enumerate(zip(recovered.tolist(), labels.tolist(), strict=True)):
        left = list(found)
        for column, label in enumerate(true):
            if label in left:
                left.remove(label)
                result[row, column] = label
    return result
