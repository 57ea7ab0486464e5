"""Labels read off the last layer."""

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.attacks.labels import in_the_order_of, labels_from_leak, labels_leak
from gitlight.config import GradientsConfig
from gitlight.data.pair import GradientPair
from gitlight.errors import ConfigError
from gitlight.evaluation.measuring import _recovered_labels
from gitlight.gradients.engine import GradientEngine


def leaks(network, n_leaks, per_leak, n_classes=10):
    torch.manual_seed(0)
    network.requires_grad_(False)
    architecture = Architecture.of(network, (3, 8, 8), n_classes)
    images = torch.rand(n_leaks, per_leak, 3, 8, 8)
    labels = torch.randint(n_classes, (n_leaks, per_leak))
    return architecture, labels, GradientEngine(network, architecture, GradientsConfig())(images, labels)


def untrained(bias=True):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 10, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
def test_the_label_of_one_image_is_exact(bias):
    architecture, labels, gradients = leaks(untrained(bias), 50, 1)
    assert torch.equal(labels_from_leak(architecture, gradients, 1), labels)


@pytest.mark.parametrize("per_leak", [2, 4, 8])
def test_labels_of_client_batches_are_counted(per_leak):
    architecture, labels, gradients = leaks(untrained(), 50, per_leak)
    found = labels_from_leak(architecture, gradients, per_leak)
    assert found.shape == labels.shape
    aligned = in_the_order_of(found, labels)
    assert (aligned == labels).double().mean() > 0.95, "an untrained model's probabilities are nearly equal"


def test_a_gradient_that_is_not_finite_stops_nothing():
    architecture, labels, gradients = leaks(untrained(), 3, 1)
    gradients["3.bias"][1] = torch.nan
    found = labels_from_leak(architecture, gradients, 1)
    assert torch.equal(found[[0, 2]], labels[[0, 2]])


def test_a_model_without_a_last_linear_layer_is_named():
    network = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    architecture, _, gradients = leaks(network, 2, 1)
    with pytest.raises(ConfigError, match=r"attack\.labels: recovered: .*ends in flatten"):
        labels_from_leak(architecture, gradients, 1)


def test_equal_labels_are_paired_once():
    assert in_the_order_of(torch.tensor([[2, 2, 3]]), torch.tensor([[2, 2, 2]])).tolist() == [[2, 2, -1]]


class Cooled(nn.Module):
    """Logits over a temperature, as log-probabilities."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return (0.5 * self.network(images) / 2.0).log_softmax(dim=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rescaled", [Cooled, lambda network: nn.Sequential(network, nn.LogSoftmax(dim=-1))])
def test_rescaled_logits_tell_labels_as_well(bias, rescaled):
    for per_leak in (1, 4):
        architecture, labels, gradients = leaks(rescaled(untrained(bias)), 50, per_leak)
        plain = leaks(untrained(bias), 50, per_leak)
        found, wanted = (
            labels_from_leak(architecture, gradients, per_leak),
            labels_from_leak(plain[0], plain[2], per_leak),
        )
        assert (in_the_order_of(found, labels) == labels).double().mean() > 0.95
        assert (found == wanted).double().mean() > 0.95
        pair = GradientPair(gradients, torch.zeros(50, per_leak, 3, 8, 8), labels, torch.zeros_like(labels))
        read = _recovered_labels(pair, None, architecture)
        assert read is None if not bias else (read == labels.flatten()).double().mean() > 0.95


@pytest.mark.parametrize("after", [lambda z: -z, lambda z: z * 0.0, lambda z: z.log_softmax(0), lambda z: 1 / z])
def test_what_does_more_than_rescale_tells_no_label(after):
    class Ending(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = untrained()

        def forward(self, images):
            return after(self.network(images))

    assert not labels_leak(Architecture.of(Ending(), (3, 8, 8), 10))
