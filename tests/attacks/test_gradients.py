"""The leaked model as a function of images, against autograd on the network itself."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from gitlight.architecture import Architecture
from gitlight.attacks.gradients import LeakedFunction
from gitlight.config import FullyConnectedConfig, LeNetConfig, ResNetConfig, ViTConfig
from gitlight.leaked.model import LeakedModel

MODELS = {
    "lenet": LeNetConfig(width=3),
    "relu": LeNetConfig(width=3, activation="relu", init="default"),
    "mlp": FullyConnectedConfig(hidden_sizes=[7]),
    "resnet20": ResNetConfig(width=4),
    "vit": ViTConfig(patch_size=4, hidden_size=12, depth=1, heads=2, mlp_size=16),
}


def leaked_function(name):
    network = LeakedModel(MODELS[name], (3, 16, 16), 5).network.double()
    architecture = Architecture.of(network, (3, 16, 16), 5)
    for buffer_name, buffer in network.named_buffers():
        if "running" in buffer_name:  # other than 0 and 1
            buffer.add_(0.3 * torch.rand_like(buffer))
    values = {key: value.detach() for key, value in (*network.named_parameters(), *network.named_buffers())}
    return network, LeakedFunction(architecture, values)


@pytest.fixture(autouse=True)
def _twice_differentiable():
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("client_batch_size", [1, 3])
def test_gradients_and_their_gradients_are_autograds(name, client_batch_size):
    torch.manual_seed(0)
    network, function = leaked_function(name)
    images = torch.rand(client_batch_size, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.softmax(torch.randn(client_batch_size, 5, dtype=torch.float64), dim=1)
    parameters = {key: value.detach().clone().requires_grad_() for key, value in network.named_parameters()}
    loss = cross_entropy(functional_call(network, parameters, (images,)), targets)
    wanted = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), create_graph=True), strict=True))
    found = function.gradient(images, targets)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-13)
    mixed = {key: torch.randn_like(value) for key, value in wanted.items()}
    (second,) = torch.autograd.grad(sum((wanted[key] * mixed[key]).sum() for key in mixed), images)

    def combined(moved):
        return sum((value * mixed[key]).sum() for key, value in function.gradient(moved, targets).items())

    torch.testing.assert_close(torch.func.grad(combined)(images.detach()), second, rtol=1e-9, atol=1e-12)


def test_batch_norm_inputs_are_what_training_mode_normalises_by():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)
    ).double()
    values = {key: value.detach() for key, value in (*network.named_parameters(), *network.named_buffers())}
    function = LeakedFunction(Architecture.of(network, (3, 8, 8), 2), values)
    images = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    (found,) = function.batch_norm_inputs(images)
    seen = network[0](images).detach()
    torch.testing.assert_close(found.mean, seen.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(found.variance, seen.var(dim=(0, 2, 3), unbiased=False))
    torch.testing.assert_close(found.running_variance, network[1].running_var)


def test_a_model_that_splits_is_followed():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Conv2d(3, 4, 3), nn.Linear(2 * 36, 2)

        def forward(self, images):
            values, gate = self.enter(images).chunk(2, dim=1)
            return self.leave((values * torch.sigmoid(gate)).flatten(1))

    torch.manual_seed(0)
    network = Gated().double()
    images, targets = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    parameters = dict(network.named_parameters())
    wanted = torch.autograd.grad(cross_entropy(network(images), targets), list(parameters.values()))
    values = {key: value.detach() for key, value in parameters.items()}
    found = LeakedFunction(Architecture.of(network, (3, 8, 8), 2), values).gradient(images, targets)
    for value, its in zip(wanted, found.values(), strict=True):
        torch.testing.assert_close(its, value)


def test_it_moves_to_another_precision():
    _, function = leaked_function("resnet20")
    moved = function.to(torch.device("cpu"), torch.float32)
    found = moved.gradient(torch.rand(1, 3, 16, 16), torch.full((1, 5), 0.2))
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_attention_of_several_images_has_a_rule_whichever_kernel_is_allowed(recwarn):
    _, function = leaked_function("vit")
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    wanted = function.logits(images)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), torch.no_grad():
        torch.testing.assert_close(function.logits(images), wanted)
    assert not [warning for warning in recwarn if "batching rule" in str(warning.message)]
