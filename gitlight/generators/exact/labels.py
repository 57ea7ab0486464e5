"""Labels from the last layer's bias gradient (Zhao et al. 2020, iDLG, §3)."""

import torch
from torch import Tensor

from gitlight.architecture import IMAGE, Architecture, Layer

NO_LABEL = -1
"""What stands for the label of a leak whose bias gradient holds NaN or infinity."""

_RULED_OUT = 1.5
"""Sum of squares, in units of ``1/N²``, by which a set of labels explains a gradient worse."""


def output_bias(architecture: Architecture) -> str | None:
    """The name of the bias whose gradient is ``δ``: that of the linear layer that puts out the logits.

    Returns:
        The parameter's name, or None where the model does not end in a linear layer with a bias.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> output_bias(Architecture.of(model, image_shape=(3, 2, 2), n_classes=2))
    '1.bias'
    """
    last = architecture[architecture.output]
    return last.parameters.get("bias") if last.kind == "linear" and len(last.input_shape) == 1 else None


def below_rescaling(architecture: Architecture) -> tuple[Layer, float]:
    """The layer that puts out the logits before they are only rescaled, and the factor.

    The cross-entropy's own softmax leaves a ``log_softmax`` of the leaked model as it is; a temperature ``T`` makes
    ``1/T`` of the layer's ``δ``, which keeps its signs.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.LogSoftmax(dim=1))
    >>> layer, factor = below_rescaling(Architecture.of(model, image_shape=(3, 2, 2), n_classes=2))
    >>> layer.name, factor
    ('1', 1.0)
    """
    layer, factor = architecture[architecture.output], 1.0
    while len(layer.inputs) == 1 and layer.inputs[0] != IMAGE and not layer.parameters and not layer.constants:
        if layer.kind == "log_softmax" and layer.arguments["dim"] in (1, -1):
            pass
        elif layer.kind in ("mul", "div") and (other := _positive(layer)) is not None:
            factor *= other if layer.kind == "mul" else 1 / other
        else:
            break
        layer = architecture[layer.inputs[0]]
    return layer, factor


def _positive(layer: Layer) -> float | None:
    """The number that a layer multiplies by or divides by, if it is positive."""
    other = layer.arguments.get("other")
    if layer.roles != ("self",) or layer.arguments.get("rounding_mode") or not isinstance(other, int | float):
        return None
    return float(other) if other > 0 else None


def labels_from_bias_gradient(delta: Tensor) -> Tensor:
    """The label of each leak of a single image, read off the last layer's bias gradient.

    Under cross-entropy that gradient is ``δ = softmax(z) − y``. Probabilities lie between 0 and 1, so the label's entry
    is the only negative one. Taking the smallest entry rather than the sign of each also gives one answer where a
    channel has added noise. With several images per leak the gradient is an average, and this does not apply.

    >>> labels_from_bias_gradient(torch.tensor([[0.2, -0.7, 0.5], [-0.1, 0.1, 0.0]])).tolist()
    [1, 0]

    Args:
        delta: ``(B, classes)``, the bias gradients of ``B`` leaks of one image each.

    Returns:
        Labels, ``(B,)`` int64; -1 where a gradient is not finite.

    Raises:
        ValueError: ``delta`` is not a matrix with at least one column.
    """
    if delta.ndim != 2 or delta.shape[1] == 0:
        raise ValueError(f"Expected bias gradients (leaks, classes), not a tensor of shape {tuple(delta.shape)}.")
    return torch.where(torch.isfinite(delta).all(dim=1), delta.argmin(dim=1), NO_LABEL)


def labels_of_batch(bias_gradient: Tensor, probabilities: Tensor, n_images: int) -> Tensor:
    """``(B, N)`` int64, ascending: the labels of each client batch, from the last layer's bias gradient.

    One by one the class is taken that is farthest below its mean probability; each image lowers its class by ``1/N``
    (after Wainakh et al. 2021, who take all probabilities for small).

    >>> labels_of_batch(torch.tensor([[0.6, -0.2, -0.4]]), torch.tensor([0.9, 0.05, 0.05]), n_images=4).tolist()
    [[0, 1, 2, 2]]

    Args:
        bias_gradient: ``(B, classes)``, finite.
        probabilities: ``(classes,)``, of other images on average; zero for small ones.
        n_images: ``N``.
    """
    error = bias_gradient - probabilities
    found = []
    for _ in range(n_images):
        smallest = error.argmin(dim=1, keepdim=True)
        found.append(smallest)
        error = error.scatter_add(1, smallest, torch.full_like(smallest, 1 / n_images, dtype=error.dtype))
    return torch.cat(found, dim=1).sort(dim=1).values


def next_labels_of_batch(bias_gradient: Tensor, probabilities: Tensor, labels: Tensor, n_others: int) -> Tensor:
    """``(B, n_others, N)`` int64, ascending: the sets that explain the bias gradient next best, one label exchanged.

    Those with the least sum of squared differences from mean probabilities come first. Sets with a sum that is larger
    by ``1.5/N²`` are as good as ruled out (an image is worth ``1/N``); in their place are the labels as given.

    >>> gradient, probabilities = torch.tensor([[0.6, -0.3, -0.3]]), torch.tensor([0.9, 0.05, 0.05])
    >>> next_labels_of_batch(gradient, probabilities, torch.tensor([[0, 1, 2, 2]]), 3).tolist()
    [[[0, 1, 1, 2], [0, 0, 1, 2], [0, 1, 2, 2]]]

    Args:
        bias_gradient: ``(B, classes)``, finite.
        probabilities: ``(classes,)``, of other images on average.
        labels: ``(B, N)``, as of `labels_of_batch`.
        n_others: how many sets.
    """
    n_images, n_classes = labels.shape[1], bias_gradient.shape[1]
    count = torch.nn.functional.one_hot(labels, n_classes).sum(dim=1)
    error = bias_gradient - probabilities + count / n_images
    without, with_one = ((error + move).square() - error.square() for move in (-1 / n_images, 1 / n_images))
    # One more of each than wanted, as no class is exchanged for itself; of all classes there may be many pairs.
    n_each = min(n_others + 1, n_classes)
    lost = without.masked_fill(count == 0, torch.inf).topk(n_each, largest=False)
    won = with_one.topk(n_each, largest=False)
    worse = lost.values.unsqueeze(2) + won.values.unsqueeze(1)
    worse = worse.masked_fill(lost.indices.unsqueeze(2) == won.indices.unsqueeze(1), torch.inf)
    best = worse.flatten(1).topk(min(n_others, n_each**2), largest=False)
    removed = lost.indices.gather(1, best.indices // n_each)
    added = won.indices.gather(1, best.indices % n_each)
    place = (labels.unsqueeze(1) == removed.unsqueeze(2)).int().argmax(dim=2, keepdim=True)
    exchanged = labels.unsqueeze(1).repeat(1, best.indices.shape[1], 1).scatter_(2, place, added.unsqueeze(2))
    exchanged = torch.where((best.values < _RULED_OUT / n_images**2).unsqueeze(2), exchanged, labels.unsqueeze(1))
    return exchanged.sort(dim=2).values
