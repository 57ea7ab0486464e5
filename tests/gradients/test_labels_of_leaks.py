import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, UpdatesConfig
from gitlight.errors import DataError
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.labels import cross_entropy
from gitlight.gradients.updates import LocalUpdates

IMAGES = torch.rand(3, 2, 3, 2, 2)


def make(method, labels):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    architecture = Architecture.of(network, (3, 2, 2), 4)
    if method == "updates":
        settings = GradientsConfig(updates=UpdatesConfig(epochs=2))
        return LocalUpdates(network, architecture, settings)(IMAGES, labels, torch.arange(3))
    return GradientEngine(network, architecture, GradientsConfig(method=method))(IMAGES, labels)


@pytest.mark.parametrize("method", ["auto", "captured", "vmap", "loop", "updates"])
@pytest.mark.parametrize("label", [4, -1, -100])
def test_a_label_that_is_no_class_is_named_with_its_place(method, label):
    labels = torch.zeros(3, 2, dtype=torch.int64)
    labels[2, 1] = label
    with pytest.raises(
        DataError, match=f"image 1 of leak 2 has label {label}, and the leaked model has classes 0 to 3"
    ):
        make(method, labels)


@pytest.mark.parametrize("method", ["auto", "captured", "vmap", "loop", "updates"])
@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (torch.zeros(6, dtype=torch.int64), r"torch\.int64 of shape \(6,\)"),
        (torch.zeros(3, 2), r"torch\.float32 of shape \(3, 2\)"),
        (torch.zeros(3, 2, 4), r"torch\.float32 of shape \(3, 2, 4\)"),
    ],
    ids=["flat", "float", "probabilities"],
)
def test_labels_of_another_shape_or_type_are_named(method, labels, found):
    with pytest.raises(DataError, match=rf"one int64 number an image, of shape \(3, 2\) .*, not {found}"):
        make(method, labels)


def test_the_loss_leaves_no_label_out():
    # What a GPU's labels, which are not looked at, end in: an assertion of its own.
    with pytest.raises(IndexError, match="-100"):
        cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
