import pytest
import torch
from exactness import autograd_loop

from gitlight.architecture import Architecture
from gitlight.config import FullyConnectedConfig, GradientsConfig, LeNetConfig
from gitlight.errors import ConfigError
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked.lenet import lenet
from gitlight.leaked.mlp import fully_connected

SHAPE, N_CLASSES = (3, 16, 16), 10


@pytest.fixture(params=["lenet", "mlp"])
def network(request):
    torch.manual_seed(0)
    if request.param == "lenet":
        return lenet(LeNetConfig(width=4), SHAPE, N_CLASSES)
    return fully_connected(FullyConnectedConfig(hidden_sizes=[20, 15], activation="tanh"), SHAPE, N_CLASSES)


def relative_error(found, wanted):
    assert list(found) == list(wanted)
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)


def test_gradients_are_autograds_without_a_choice_of_method(network):
    images, labels = torch.rand(5, 3, *SHAPE), torch.randint(N_CLASSES, (5, 3))
    engine = GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), GradientsConfig(dtype="float64"))
    assert relative_error(engine(images, labels), autograd_loop(network, images, labels)) < 1e-10


def test_chunks_keep_to_the_limit_and_do_not_change_the_result(network):
    images, labels = torch.rand(7, 2, *SHAPE), torch.randint(N_CLASSES, (7, 2))
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    whole = GradientEngine(network, architecture, GradientsConfig(method="vmap", dtype="float64"))(images, labels)
    n_forward = []
    network.register_forward_hook(lambda *_: n_forward.append(1))
    results = 7 * architecture.n_parameters
    a_leak = 2 * architecture.n_parameters + 3 * 2 * architecture.n_activations
    for at_once, n_chunks in ((7.5, 1), (2.5, 4), (1.5, 7)):
        limit = 8 * (2 * results + at_once * a_leak) / 1e9
        settings = GradientsConfig(method="vmap", dtype="float64", memory_limit_gb=limit)
        n_forward.clear()
        chunked = GradientEngine(network, architecture, settings)(images, labels)
        assert relative_error(chunked, whole) < 1e-12
        assert len(n_forward) == n_chunks


def test_gradients_have_full_precision_whatever_the_gpu_would_do(network):
    seen = []
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    network.register_forward_hook(lambda *_: seen.append((conv.fp32_precision, matmul.fp32_precision)))
    before = (conv.fp32_precision, matmul.fp32_precision)
    engine = GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), GradientsConfig(method="vmap"))
    engine(torch.rand(2, 1, *SHAPE), torch.zeros(2, 1, dtype=torch.int64))
    assert set(seen) == {("ieee", "ieee")}
    assert (conv.fp32_precision, matmul.fp32_precision) == before


def test_an_impossible_memory_limit_says_what_is_needed(network):
    architecture = Architecture.of(network, SHAPE, N_CLASSES)
    engine = GradientEngine(network, architecture, GradientsConfig(memory_limit_gb=1e-6))
    with pytest.raises(ConfigError, match=r"gradients.memory_limit_gb: 1e-06 GB is too little.*data.batch_size"):
        engine(torch.rand(4, 1, *SHAPE), torch.zeros(4, 1, dtype=torch.int64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_made_where_autograd_is_off(network, mode):
    images, labels = torch.rand(2, 1, *SHAPE), torch.zeros(2, 1, dtype=torch.int64)
    engine = GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), GradientsConfig())
    wanted = engine(images, labels)
    with mode():
        found = engine(images + 0, labels + 0)
    assert relative_error(found, wanted) == 0


def test_the_leaked_model_is_followed_as_it_trains(network):
    engine = GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), GradientsConfig())
    images, labels = torch.rand(2, 1, *SHAPE), torch.zeros(2, 1, dtype=torch.int64)
    engine(images, labels)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    assert relative_error(engine(images, labels), autograd_loop(network, images, labels)) < 1e-5


def test_gradients_of_a_frozen_model_and_of_trained_parameters_alone(network):
    images, labels = torch.rand(2, 1, *SHAPE), torch.zeros(2, 1, dtype=torch.int64)
    wanted = autograd_loop(network, images, labels)
    network.requires_grad_(False)
    frozen = GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), GradientsConfig())(images, labels)
    assert relative_error(frozen, wanted) < 1e-5
    last = list(wanted)[-1]
    dict(network.named_parameters())[last].requires_grad_(True)
    some = GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), GradientsConfig())(images, labels)
    assert relative_error(some, {last: wanted[last]}) < 1e-5


def test_a_model_that_cannot_be_compiled_is_a_clear_error(monkeypatch):
    network = fully_connected(FullyConnectedConfig(hidden_sizes=[8]), SHAPE, N_CLASSES)
    engine = GradientEngine(network, Architecture.of(network, SHAPE, N_CLASSES), GradientsConfig(method="compiled"))

    def without_compiler(*_, **__):
        raise torch._inductor.exc.InvalidCxxCompiler()

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", without_compiler)
    torch._dynamo.reset()
    with pytest.raises(ConfigError, match=r"gradients.method: compiled does not work.*Give gradients.method=auto"):
        engine(torch.rand(5, 1, *SHAPE), torch.zeros(5, 1, dtype=torch.int64))
