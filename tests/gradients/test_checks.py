import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, UpdatesConfig
from gitlight.errors import DataError
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.labels import cross_entropy
from gitlight.gradients.updates import LocalUpdates

METHODS = ["auto", "captured", "vmap", "loop", "updates"]
IMAGES = torch.rand(3, 2, 3, 2, 2)


def make(method, labels, images=IMAGES, seeds=None):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    architecture = Architecture.of(network, (3, 2, 2), 4)
    if method == "updates":
        settings = GradientsConfig(updates=UpdatesConfig(epochs=2))
        seeds = torch.arange(len(images)) if seeds is None else seeds
        return LocalUpdates(network, architecture, settings)(images, labels, seeds)
    return GradientEngine(network, architecture, GradientsConfig(method=method))(images, labels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("label", [4, -1, -100])
def test_a_label_that_is_no_class_is_named_with_its_place(method, label):
    labels = torch.zeros(3, 2, dtype=torch.int64)
    labels[2, 1] = label
    with pytest.raises(
        DataError, match=f"image 1 of leak 2 has label {label}, and the leaked model has classes 0 to 3"
    ):
        make(method, labels)


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(3, 2, 3, 2, 3), r"expected shape \(leaks, images, 3, 2, 2\), .* not \(3, 2, 3, 2, 3\)\. Resize"),
        (torch.rand(3, 2, 12, 1, 1), r"expected shape \(leaks, images, 3, 2, 2\), .* not \(3, 2, 12, 1, 1\)"),
        (torch.rand(3, 2, 12), r"expected shape \(leaks, images, 3, 2, 2\), .* not \(3, 2, 12\)"),
        (torch.rand(3, 2, 1, 3, 2, 2), r"expected shape \(leaks, images, 3, 2, 2\), .* not \(3, 2, 1, 3, 2, 2\)"),
        (IMAGES.mul(255).byte(), r"expected values in \[0, 1\] of floating point, not torch\.uint8\. Divide"),
        (IMAGES.bool(), r"expected values in \[0, 1\] of floating point, not torch\.bool"),
    ],
    ids=["size", "as many values", "flat", "deep", "bytes", "bool"],
)
def test_images_that_the_model_does_not_take_are_named(method, images, words):
    with pytest.raises(DataError, match=f"^images: {words}"):
        make(method, torch.zeros(3, 2, dtype=torch.int64), images)


@pytest.mark.parametrize("method", METHODS)
def test_leaks_without_images_are_named(method):
    with pytest.raises(DataError, match=r"^images: 3 leaks of 0 images each.* at least one image"):
        make(method, torch.zeros(3, 0, dtype=torch.int64), IMAGES[:, :0])


@pytest.mark.parametrize("method", METHODS)
def test_of_no_leaks_there_are_no_gradients(method):
    found = make(method, torch.zeros(0, 2, dtype=torch.int64), IMAGES[:0])
    assert {name: tuple(gradient.shape) for name, gradient in found.items()} == {
        "1.weight": (0, 4, 12),
        "1.bias": (0, 4),
    }


@pytest.mark.parametrize(
    ("seeds", "found"),
    [
        (torch.arange(1), r"torch\.int64 of shape \(1,\)"),
        (torch.arange(4), r"torch\.int64 of shape \(4,\)"),
        (torch.arange(3)[:, None], r"torch\.int64 of shape \(3, 1\)"),
        (torch.tensor(5), r"torch\.int64 of shape \(\)"),
        (torch.rand(3), r"torch\.float32 of shape \(3,\)"),
    ],
    ids=["one", "too many", "column", "number", "float"],
)
def test_seeds_that_are_not_one_a_client_are_named(seeds, found):
    with pytest.raises(DataError, match=rf"^seeds: expected one int64 number a leak, of shape \(3,\), not {found}"):
        make("updates", torch.zeros(3, 2, dtype=torch.int64), seeds=seeds)


def test_the_loss_leaves_no_label_out():
    # What a GPU's labels, which are not looked at, end in: an assertion of its own.
    with pytest.raises(IndexError, match="-100"):
        cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
