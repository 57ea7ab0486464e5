"""Methods that `torch.func` or a loop of autograd carries: which falls back to which, and what is run again."""

import copy

import pytest
import torch
from exactness import N_CLASSES, SHAPE, assert_exact, engine_of, pairs
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, UpdatesConfig
from gitlight.errors import ArchitectureError, ConfigError
from gitlight.gradients.updates import LocalUpdates


class Recurrent(nn.Module):
    """Rows of an image, one after the other; vmap has no rule for it."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(12, 7, batch_first=True), nn.Linear(7, N_CLASSES)

    def forward(self, images):
        images.sub_(0.5).div_(0.25)  # it is run again by the loop, which is not to see this
        return self.head(self.gru(images.movedim(1, 2).flatten(2))[0][:, -1])


def test_where_vmap_cannot_the_loop_does():
    torch.manual_seed(0)
    assert_exact(Recurrent())
    assert_exact(Recurrent(), method="loop")
    with pytest.raises(ConfigError, match=r"vmap does not work for this leaked model: .* gradients.method=loop"):
        engine_of(Recurrent(), "vmap")(*pairs())


def test_updates_fall_back_as_gradients_do():
    torch.manual_seed(0)
    network, (images, labels), seeds = Recurrent(), pairs(3), torch.arange(3)
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    made = {}
    for method in ("auto", "loop"):
        updates = UpdatesConfig(epochs=2, batch_size=2, learning_rate=0.1)
        settings = GradientsConfig(method=method, dtype="float64", updates=updates)
        made[method] = LocalUpdates(network, architecture, settings)(images, labels, seeds)
    for name, update in made["loop"].items():
        assert torch.allclose(made["auto"][name], update, rtol=1e-12), name
        assert not torch.allclose(update, engine_of(network, "loop")(images, labels)[name])
    vectorised = LocalUpdates(network, architecture, GradientsConfig(method="vmap", updates=updates))
    with pytest.raises(ConfigError, match=r"vmap does not work for this leaked model"):
        vectorised(images, labels, seeds)


class Overwriting(nn.Module):
    """Adds to what the sigmoid's derivative is made of."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(48, 6), nn.Linear(6, N_CLASSES)

    def forward(self, images):
        hidden = self.first(images.flatten(1)).sigmoid()
        hidden += 1
        return self.last(hidden)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_a_model_that_autograd_cannot_differentiate_is_named_with_what_to_do(method):
    with pytest.raises(ArchitectureError, match=r"Overwriting has no gradients: .*inplace operation.* `x = x \+ y`"):
        engine_of(Overwriting(), method)(*pairs())


class Checkpointed(nn.Module):
    """Computes its first layer again on the way back."""

    def __init__(self, use_reentrant=False):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(48, 6), nn.Linear(6, 6), nn.Linear(6, N_CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, images):
        hidden = self.first(images.flatten(1))
        return self.last(checkpoint(lambda x: self.second(x).tanh(), hidden, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_computed_again_on_the_way_back_has_each_clients_own_weights(method, use_reentrant):
    torch.manual_seed(0)
    network, (images, labels) = Checkpointed(use_reentrant), pairs(2)
    settings = GradientsConfig(method=method, dtype="float64", updates=UpdatesConfig(epochs=3, learning_rate=0.5))
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    found = LocalUpdates(network, architecture, settings)(images, labels, torch.arange(3))
    for number in range(3):
        client = copy.deepcopy(network).double()
        optimizer = torch.optim.SGD(client.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(client(images[number].double()), labels[number]).backward()
            optimizer.step()
        for (name, before), after in zip(network.named_parameters(), client.parameters(), strict=True):
            assert torch.allclose(found[name][number], (before - after) / 1.5, atol=1e-12), name
    assert_exact(network, method=method)


def test_the_models_own_error_is_raised_as_it_is():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, N_CLASSES))
    engine = engine_of(network, "vmap")
    network[1] = nn.Linear(47, N_CLASSES)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine(*pairs())
