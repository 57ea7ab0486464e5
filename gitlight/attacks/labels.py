"""Labels from a leak's last layer, for client batches of any size."""

import torch
from torch import Tensor

from gitlight.architecture import Architecture, Layer
from gitlight.data.pair import Gradients
from gitlight.errors import ConfigError
from gitlight.generators.exact.labels import below_rescaling, labels_of_batch


def labels_from_leak(architecture: Architecture, gradients: Gradients, client_batch_size: int) -> Tensor:
    """The labels of each leak, in ascending order.

    With cross-entropy the last layer's bias gradient is ``mean_i (softmax(z_i) − y_i)``. For one image the label's
    entry is the only negative one (Zhao et al. 2020). For more, each image of a class lowers that class's entry by
    ``1/N``: the smallest entry's class is taken, ``1/N`` is added there, and so on, ``N`` times (after Wainakh et al.
    2021, whose impact of a class is ``1/N`` where the probabilities of others are small). Where there is no bias, the
    sums over a weight gradient's rows stand for it, which have its signs where activations are not negative. A
    ``log_softmax`` or a constant temperature behind the layer makes no difference.

    Args:
        architecture: the leaked model's.
        gradients: of ``B`` leaks.
        client_batch_size: ``N``.

    Returns:
        ``(B, N)`` int64; zeros where a gradient is not finite.

    Raises:
        ConfigError: the model does not end in a linear layer whose whole gradient leaks.
    """
    last, factor = below_rescaling(architecture)
    names = _tell_labels(last, architecture)
    if not names:
        raise ConfigError(
            f"attack.labels: recovered: labels are read off the gradient of a last linear layer, and the leaked model "
            f"ends in {architecture[architecture.output].place}. Give attack.labels=optimised, or attack.labels=given."
        )
    error = gradients[names[0]]
    error = error.double() if error.dim() == 2 else error.double().sum(dim=2)
    error = torch.nan_to_num(error) / factor
    # In units in which one image's worth is 1/N; the bias gradient has them already.
    if names[0] == last.parameters.get("weight"):
        negative = error.clamp_max(0).sum(dim=1, keepdim=True).abs().clamp_min(1e-300)
        error = error / negative
    return labels_of_batch(error, error.new_zeros(()), client_batch_size)


def labels_leak(architecture: Architecture) -> bool:
    """Whether `labels_from_leak` can read them."""
    return bool(_tell_labels(below_rescaling(architecture)[0], architecture))


def _tell_labels(last: Layer, architecture: Architecture) -> list[str]:
    """The parameters of a last linear layer whose whole gradients leak, the bias first."""
    names = [last.parameters[role] for role in ("bias", "weight") if role in last.parameters]
    return [name for name in names if name not in architecture.sketched] if last.kind == "linear" else []


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
