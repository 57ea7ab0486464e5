"""Labels read off the last layer."""

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.attacks.labels import LabelReader, in_the_order_of
from gitlight.config import GradientsConfig
from gitlight.data.pair import GradientPair
from gitlight.errors import ConfigError
from gitlight.evaluation.measuring import _recovered_labels
from gitlight.gradients.engine import GradientEngine


def leaks(network, n_leaks, per_leak, n_classes=10, seed=0):
    torch.manual_seed(seed)
    network.requires_grad_(False)
    architecture = Architecture.of(network, (3, 8, 8), n_classes)
    images = torch.rand(n_leaks, per_leak, 3, 8, 8)
    labels = torch.randint(n_classes, (n_leaks, per_leak))
    gradients = GradientEngine(network, architecture, GradientsConfig())(images, labels)
    return architecture, GradientPair(gradients, images, labels, torch.zeros_like(labels))


def untrained(bias=True):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 10, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
def test_the_label_of_one_image_is_exact(bias):
    architecture, pair = leaks(untrained(bias), 50, 1)
    assert torch.equal(LabelReader(architecture, 1)(pair.gradients), pair.labels)


def right(reader, pair):
    """Share of labels that are read right."""
    found = reader(pair.gradients)
    assert found.shape == pair.labels.shape
    return (in_the_order_of(found, pair.labels) == pair.labels).double().mean()


@pytest.mark.parametrize("per_leak", [2, 4, 8])
def test_labels_of_client_batches_are_counted(per_leak):
    architecture, pair = leaks(untrained(), 50, per_leak)
    assert right(LabelReader(architecture, per_leak), pair) > 0.95, "untrained: probabilities are nearly equal"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_leak", [4, 16])
def test_pairs_tell_which_classes_are_probable_whatever_the_image(bias, per_leak):
    network = untrained(bias)
    with torch.no_grad():  # probabilities of some 0.6 for two classes, whatever the image
        network[-1].weight[3] += 0.03
        network[-1].weight[7] += 0.03
    architecture, private = leaks(network, 50, per_leak)
    _, public = leaks(network, 8, per_leak, seed=1)
    assert right(LabelReader(architecture, per_leak), private) < 0.9
    assert right(LabelReader(architecture, per_leak, [public]), private) == 1
    # Not finite gradients teach nothing, and no pair at all is as none was given.
    name = "3.bias" if bias else "3.weight"
    public.gradients[name][2] = torch.nan
    assert right(LabelReader(architecture, per_leak, [public]), private) == 1
    public.gradients[name][:] = torch.nan
    without = LabelReader(architecture, per_leak)(private.gradients)
    assert torch.equal(LabelReader(architecture, per_leak, [public])(private.gradients), without)


def test_a_gradient_that_is_not_finite_stops_nothing():
    architecture, pair = leaks(untrained(), 3, 1)
    pair.gradients["3.bias"][1] = torch.nan
    found = LabelReader(architecture, 1)(pair.gradients)
    assert torch.equal(found[[0, 2]], pair.labels[[0, 2]])
    assert found[1].tolist() == [-1]


def test_a_model_without_a_last_linear_layer_is_named():
    network = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    architecture, pair = leaks(network, 2, 1)
    with pytest.raises(ConfigError, match=r"attack\.labels: recovered: .*ends in flatten"):
        LabelReader(architecture, 1)(pair.gradients)


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
        architecture, pair = leaks(rescaled(untrained(bias)), 50, per_leak)
        plain_architecture, plain = leaks(untrained(bias), 50, per_leak)
        reader = LabelReader(architecture, per_leak)
        assert right(reader, pair) > 0.95
        wanted = LabelReader(plain_architecture, per_leak)(plain.gradients)
        assert (reader(pair.gradients) == wanted).double().mean() > 0.95
        read = _recovered_labels(pair, None, reader)
        assert (read == pair.labels.flatten()).double().mean() > 0.95


@pytest.mark.parametrize("after", [lambda z: -z, lambda z: z * 0.0, lambda z: z.log_softmax(0), lambda z: 1 / z])
def test_what_does_more_than_rescale_tells_no_label(after):
    class Ending(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = untrained()

        def forward(self, images):
            return after(self.network(images))

    assert not LabelReader(Architecture.of(Ending(), (3, 8, 8), 10), 1).readable
