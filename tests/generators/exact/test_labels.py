import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gitlight.architecture import Architecture
from gitlight.generators.exact.labels import NO_LABEL, labels_from_bias_gradient, output_bias


class Residual(nn.Module):
    """A model that is not a chain but ends in a linear layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.inner = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5, bias=bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = self.flatten(images)
        return self.head(flat + self.inner(flat))


def architecture(model: nn.Module) -> Architecture:
    return Architecture.of(model, image_shape=(3, 2, 2), n_classes=5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n_classes=st.integers(2, 12), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_labels_are_those_behind_gradients_from_autograd(seed: int, n_classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (4,), generator=generator)
    deltas = []
    for label in labels:
        layer = nn.Linear(6, n_classes, dtype=dtype)
        loss = nn.functional.cross_entropy(layer(torch.randn(1, 6, generator=generator, dtype=dtype)), label[None])
        deltas.append(torch.autograd.grad(loss, layer.bias)[0])
    assert torch.equal(labels_from_bias_gradient(torch.stack(deltas)), labels)


def test_labels_survive_a_little_noise() -> None:
    delta = torch.tensor([[0.02, 0.01, -0.9, 0.87]])
    noise = 0.05 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert (labels_from_bias_gradient(delta + noise) == 2).all()


def test_a_leak_that_is_not_finite_has_no_label() -> None:
    delta = torch.tensor([[0.5, -0.5], [float("nan"), -0.5], [float("-inf"), 0.5]])
    assert labels_from_bias_gradient(delta).tolist() == [1, NO_LABEL, NO_LABEL]


def test_no_leaks_have_no_labels() -> None:
    assert labels_from_bias_gradient(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (2, 3, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="leaks, classes"):
        labels_from_bias_gradient(torch.zeros(shape))


def test_output_bias_is_found_behind_branches() -> None:
    assert output_bias(architecture(Residual())) == "head.bias"


@pytest.mark.parametrize(
    "model",
    [
        Residual(bias=False),
        nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Sigmoid()),
        nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten()),
    ],
)
def test_models_without_a_last_linear_bias_have_none(model: nn.Module) -> None:
    assert output_bias(architecture(model)) is None
