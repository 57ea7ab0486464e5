import copy
import functools

import pytest
import torch
from plain_autograd import plain_updates, relative_error
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import Config, DataConfig, ExactGeneratorConfig, GradientsConfig, LeNetConfig, UpdatesConfig
from gitlight.errors import ConfigError
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.updates import LocalUpdates, describe_leak, n_local_steps, smallest_local_batch
from gitlight.leaked.batch_norm import use_batch_statistics
from gitlight.leaked.lenet import lenet
from gitlight.training import build_generator, build_pairs

SHAPE, N_CLASSES = (3, 8, 8), 10


@functools.cache
def architecture_of_lenet():
    return Architecture.of(lenet(LeNetConfig(width=3), SHAPE, N_CLASSES), SHAPE, N_CLASSES)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return lenet(LeNetConfig(width=3), SHAPE, N_CLASSES)


def clients(number, n_images):
    torch.manual_seed(1)
    images, labels = torch.rand(number, n_images, *SHAPE), torch.randint(N_CLASSES, (number, n_images))
    return images, labels, torch.arange(number) + 100


def updates_of(network, method="vmap", dtype="float64", memory_limit_gb=2.0, architecture=None, **settings):
    gradients = {"method": method, "memory_limit_gb": memory_limit_gb, "dtype": dtype}
    return LocalUpdates(
        network,
        architecture or architecture_of_lenet(),
        GradientsConfig(**gradients, updates=UpdatesConfig(**settings)),
    )


def plain_sgd(network, images, labels, seeds, epochs, batch_size, learning_rate):
    """The reference: `torch.optim.SGD` on a copy of the network for each client, in float64."""
    settings = UpdatesConfig(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
    return plain_updates(copy.deepcopy(network).double().train(), images, labels, seeds, settings)


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 2), (3, 4), (2, 3), (2, 1)])
def test_updates_equal_those_of_plain_sgd(network, method, epochs, batch_size):
    images, labels, seeds = clients(3, 4)  # batches of 3 leave one image over
    found = updates_of(network, method, epochs=epochs, batch_size=batch_size, learning_rate=0.3)(images, labels, seeds)
    assert relative_error(found, plain_sgd(network, images, labels, seeds, epochs, batch_size, 0.3)) < 1e-10


def test_float32_updates_do_not_lose_digits_at_small_rates(network):
    images, labels, seeds = clients(2, 4)
    settings = {"epochs": 2, "batch_size": 2, "learning_rate": 1e-4}
    found = updates_of(network, dtype="float32", **settings)(images, labels, seeds)
    assert all(update.dtype == torch.float32 for update in found.values())
    assert relative_error(found, updates_of(network, **settings)(images, labels, seeds)) < 1e-5


@pytest.mark.parametrize("batch_size", [None, 4, 9])
def test_one_step_is_the_mean_gradient(network, batch_size):
    images, labels, seeds = clients(3, 4)
    wanted = GradientEngine(network, architecture_of_lenet(), GradientsConfig(dtype="float64"))(images, labels)
    found = updates_of(network, batch_size=batch_size, learning_rate=0.7)(images, labels, seeds)
    assert relative_error(found, wanted) < 1e-12


def test_clients_are_the_same_in_any_batch_and_in_chunks(network):
    images, labels, seeds = clients(5, 4)
    whole = updates_of(network, epochs=2, batch_size=3)(images, labels, seeds)
    for number in range(5):
        one = slice(number, number + 1)
        alone = updates_of(network, epochs=2, batch_size=3)(images[one], labels[one], seeds[one])
        assert relative_error(alone, {name: value[one] for name, value in whole.items()}) < 1e-12
    sizes = architecture_of_lenet()
    a_client = 4 * sizes.n_parameters + 3 * 3 * sizes.n_activations
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    limit = 8 * (2 * 5 * sizes.n_parameters + 2.5 * a_client) / 1e9
    chunked = updates_of(network, memory_limit_gb=limit, epochs=2, batch_size=3)(images, labels, seeds)
    assert relative_error(chunked, whole) < 1e-12
    assert len(calls) == 3 * 4, "three chunks of four steps"


def test_the_order_depends_on_the_seed_alone(network):
    images, labels, seeds = clients(2, 4)
    updates = updates_of(network, batch_size=2, learning_rate=1.0)
    first = updates(images, labels, seeds)
    torch.manual_seed(9)
    assert relative_error(updates(images, labels, seeds), first) == 0
    assert relative_error(updates(images, labels, seeds + 7), first) > 1e-6


def test_an_impossible_memory_limit_says_what_is_needed(network):
    with pytest.raises(ConfigError, match=r"gradients.memory_limit_gb: 1e-06 GB is too little.*updates of 2 clients"):
        updates_of(network, memory_limit_gb=1e-6, batch_size=2)(*clients(2, 4))


@pytest.mark.parametrize(("hidden", "calls_a_step"), [(2000, 5), (20, 1)])
def test_clients_take_turns_where_operations_are_large(hidden, calls_a_step):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, hidden), nn.Tanh(), nn.Linear(hidden, N_CLASSES))
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    given, calls = clients(5, 4), []
    network.register_forward_hook(lambda *_: calls.append(1))
    found = updates_of(network, "auto", architecture=architecture, epochs=2, learning_rate=0.3)(*given)
    assert len(calls) == 2 * calls_a_step
    assert relative_error(found, plain_sgd(network, *given, epochs=2, batch_size=4, learning_rate=0.3)) < 1e-10


@pytest.mark.parametrize("method", ["captured", "compiled"])
def test_methods_for_the_model_s_own_weights_are_refused_by_name(network, method):
    with pytest.raises(ConfigError, match=rf"gradients.method: {method} makes.*gradients.method=auto, vmap or loop"):
        updates_of(network, method, epochs=2)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_batch_norm_over_each_local_batch(method):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, N_CLASSES)
    )
    reference = copy.deepcopy(network)
    use_batch_statistics(network)
    images, labels, seeds = clients(2, 4)
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    updates = updates_of(network, method, architecture=architecture, epochs=2, batch_size=3, learning_rate=0.1)
    found = updates(images, labels, seeds)
    assert relative_error(found, plain_sgd(reference, images, labels, seeds, 2, 3, 0.1)) < 1e-10


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_shared_and_repeated_modules_stay_what_they_are(method):
    torch.manual_seed(0)
    repeated, tied = nn.Linear(192, 192), nn.Linear(192, 192)
    tied.weight = repeated.weight
    network = nn.Sequential(nn.Flatten(), repeated, nn.Tanh(), repeated, nn.Tanh(), tied, nn.Linear(192, N_CLASSES))
    before = {name: (parameter, parameter.clone()) for name, parameter in network.named_parameters()}
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    images, labels, seeds = clients(2, 3)
    updates = updates_of(network, method, architecture=architecture, batch_size=2, learning_rate=0.5)
    found = updates(images, labels, seeds)
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in network.named_parameters())
    assert relative_error(found, plain_sgd(network, images, labels, seeds, 1, 2, 0.5)) < 1e-10


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_updates_are_made_where_autograd_is_off(network, mode):
    images, labels, seeds = clients(2, 3)
    updates = updates_of(network, batch_size=2)
    wanted = updates(images, labels, seeds)
    with mode():
        assert relative_error(updates(images + 0, labels + 0, seeds), wanted) == 0


@pytest.mark.parametrize(
    ("settings", "n_images", "steps", "smallest"),
    [
        ({}, 1, 1, 1),
        ({}, 8, 1, 8),
        ({"epochs": 3}, 8, 3, 8),
        ({"batch_size": 3}, 8, 3, 2),
        ({"batch_size": 99}, 8, 1, 8),
    ],
)
def test_steps_are_counted(settings, n_images, steps, smallest):
    settings = UpdatesConfig(**settings)
    assert n_local_steps(settings, n_images) == steps
    assert smallest_local_batch(settings, n_images) == smallest
    assert (describe_leak(settings, n_images) == "gradient") == (steps == 1)


@functools.cache
def data_module(**updates):
    data = DataConfig(client_batch_size=4, n_public_images=600)
    gradients = GradientsConfig(updates=UpdatesConfig(**updates))
    return build_pairs(Config(data=data, leaked=LeNetConfig(width=3), gradients=gradients))


def pairs(updates, split="test", epoch=0, rows=slice(None)):
    module = data_module(**updates)
    images = torch.randint(256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = [part.view(3, 4, *part.shape[1:])[rows].flatten(0, 1) for part in (images, torch.arange(12) % 3)]
    return module.prepare((*batch, torch.arange(12).view(3, 4)[rows].flatten()), split, epoch).gradients


def test_the_data_module_makes_updates_that_do_not_depend_on_the_batch():
    several = {"epochs": 2, "batch_size": 2, "learning_rate": 0.5}
    together = pairs(several)
    assert relative_error(together, pairs({})) > 1e-3
    alone = pairs(several, rows=slice(1, 2))
    assert relative_error(alone, {name: value[1:2] for name, value in together.items()}) < 1e-5


def test_local_orders_are_fresh_in_every_epoch_of_training():
    several = {"batch_size": 1, "learning_rate": 1.0}
    assert relative_error(pairs(several, "train", 0), pairs(several, "train", 1)) > 1e-6
    assert relative_error(pairs(several, "test", 0), pairs(several, "test", 1)) == 0


def test_exact_refuses_updates_and_takes_single_steps():
    config = Config(generator=ExactGeneratorConfig(), gradients=GradientsConfig(updates=UpdatesConfig(epochs=2)))
    with pytest.raises(ConfigError, match=r"gradients.updates: exact inverts one gradient.*update\(epochs=2"):
        build_generator(config, architecture_of_lenet())
    config.gradients.updates.epochs = 1
    build_generator(config, architecture_of_lenet())
