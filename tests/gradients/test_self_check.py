"""Models whose graph is not the whole of them: what the engine makes is what autograd makes, or refused by name."""

from dataclasses import replace

import pytest
import torch
from exactness import N_CLASSES, SHAPE, Reversed, assert_are_autograds, assert_exact, autograd_loop, engine_of, pairs
from torch import nn
from torch.nn import functional as F

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, SketchConfig
from gitlight.errors import ConfigError
from gitlight.gradients.captured import CapturedGradients
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.sketch import Sketch


class Model(nn.Module):
    """Two layers, and something in between."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last = nn.Linear(48, 6), nn.Linear(6, N_CLASSES)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.between = between

    def forward(self, images):
        return self.last(self.between(self, self.first(images.flatten(1))))


def scaled_without_gradient(model, x):
    with torch.no_grad():
        factor = x.mean(1, keepdim=True)
    return x * factor


def view_before_in_place(model, x):
    view = x.view(-1, 2, 3)
    return (x.mul_(2) + view.flatten(1)) * model.scale


def complex_product(model, x):
    return (torch.complex(x, x.cos()) * model.scale + 1).abs()


def over_the_batch(model, x):
    return x / x.detach().abs().nan_to_num(0).max()


def norm_of_one_parameter(model, x):
    return F.layer_norm(x, (6,), model.scale, model.scale)


BETWEEN = {
    "own backward": lambda model, x: Reversed.apply(x),
    "no_grad": scaled_without_gradient,
    "view before in place": view_before_in_place,
    "complex": complex_product,
    "over the batch": over_the_batch,
    "one parameter as two arguments": norm_of_one_parameter,
}


@pytest.mark.parametrize("client_batch_size", [1, 2])
@pytest.mark.parametrize("between", BETWEEN)
def test_what_a_graph_leaves_out_is_in_the_gradients(between, client_batch_size):
    torch.manual_seed(0)
    assert_exact(Model(BETWEEN[between]), client_batch_size)


@pytest.mark.parametrize("between", ["own backward", "no_grad", "view before in place", "over the batch"])
def test_captured_by_name_is_refused_where_it_would_be_wrong(between):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"captured does not fit this leaked model.*(autograd|tie)"):
        engine_of(Model(BETWEEN[between]), "captured")(*pairs())


@pytest.mark.parametrize("between", [norm_of_one_parameter, complex_product])
def test_one_parameter_as_two_arguments_and_one_of_complex_numbers_are_captured(between):
    torch.manual_seed(0)
    assert_exact(Model(between), method="captured")


@pytest.mark.parametrize("method", ["auto", "loop", "vmap"])
def test_images_that_a_forward_pass_overwrites_or_that_want_gradients_stay_as_they_are(method):
    torch.manual_seed(0)
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, N_CLASSES))
    images, labels = pairs()
    images = images.double() - 0.5
    before = images.clone()
    engine = engine_of(network, method)
    made = engine(images, labels)
    assert torch.equal(images, before)
    assert torch.equal(engine(images.requires_grad_(), labels)["2.weight"], made["2.weight"])


@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_a_backward_pass_of_ones_own_is_seen_however_little_it_counts(scale):
    torch.manual_seed(0)
    network = Model(lambda model, x: x + model.scale * Reversed.apply(model.branch(x)))
    network.branch = nn.Linear(6, 6)
    nn.init.constant_(network.scale, scale)
    engine, (images, labels) = engine_of(network), pairs()
    engine(images, labels)
    nn.init.constant_(network.scale, 0.5)
    found = engine(images, labels)
    assert_are_autograds(found, network, images, labels)


class Keeps(nn.Module):
    """Keeps what it computes, to be looked at."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(48, 6), nn.Linear(6, N_CLASSES)

    def forward(self, images):
        self.features = self.first(images.flatten(1)).tanh()
        return self.last(self.features)


def test_a_model_that_keeps_features_is_left_as_it_is():
    torch.manual_seed(0)
    network = Keeps()
    engine = engine_of(network, "captured")
    for client_batch_size in (2, 1):
        engine(*pairs(client_batch_size))
    assert not hasattr(network, "features")


def test_a_mask_of_one_row_is_counted():
    torch.manual_seed(0)

    def attended(model, x):
        queries = x.view(-1, 2, 3)
        return F.scaled_dot_product_attention(queries, queries, queries, x[:, :2].mean(0, keepdim=True) * 0).flatten(1)

    assert_exact(Model(attended), method="vmap")


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_weights_that_were_made_in_inference_mode(method):
    with torch.inference_mode():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Flatten(), nn.Linear(48, N_CLASSES)).double()
    torch.manual_seed(0)
    same = nn.Sequential(nn.Flatten(), nn.Linear(48, N_CLASSES)).double()
    images, labels = pairs()
    with torch.inference_mode():
        found = engine_of(made, method)(images, labels)
    for name, wanted in autograd_loop(same, images, labels).items():
        assert torch.allclose(found[name].clone(), wanted, rtol=1e-10, atol=1e-13), name


def test_another_librarys_operation_is_not_taken_for_atens_of_the_same_name():
    torch.manual_seed(0)
    with torch.library._scoped_library("gitlight_tests", "FRAGMENT") as library:
        library.define("linear(Tensor input, Tensor weight) -> Tensor")
        library.impl("linear", lambda x, weight: 3 * x @ weight.T.sin(), "CompositeImplicitAutograd")
        assert_exact(Model(lambda model, x: torch.ops.gitlight_tests.linear(x, torch.diag(model.scale))))


class ConstantOperands(nn.Module):
    """A convolution and attention that take nothing but parameters in a place where images are usual."""

    def __init__(self):
        super().__init__()
        self.kernel, self.image = nn.Parameter(torch.rand(4, 3, 3, 3)), nn.Parameter(torch.rand(1, 3, 4, 4))
        self.keys, self.head = nn.Parameter(torch.rand(1, 6, 8)), nn.Linear(64, N_CLASSES)

    def forward(self, images):
        features = F.conv2d(images, self.kernel * 2, padding=1) + F.conv2d(self.image, self.kernel, padding=1)
        queries = images.reshape(-1, 6, 8)
        attended = F.scaled_dot_product_attention(queries, self.keys, self.keys)
        return self.head(features.flatten(1) + F.pad(attended.flatten(1), (0, 16)))


def test_operations_on_parameters_alone_are_counted_and_exact():
    torch.manual_seed(0)
    assert_exact(ConstantOperands())


def test_a_sketch_of_a_model_without_a_layer_that_leaks():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, N_CLASSES))
    architecture = replace(Architecture.of(network, SHAPE, N_CLASSES), layers=())
    assert Sketch(architecture, SketchConfig(name="count", size=16)).shapes["1.weight"] == (16,)


class PartlyWithoutGradient(nn.Module):
    """A part of its gradients is what a graph leaves out: the share that its factor moves."""

    def __init__(self, share):
        super().__init__()
        self.first, self.last, self.share = nn.Linear(48, 6), nn.Linear(6, N_CLASSES), share

    def forward(self, images):
        x = self.first(images.flatten(1)).tanh()
        with torch.no_grad():
            factor = x.mean(1, keepdim=True)
        return self.last(x * (1 + self.share * factor))


def engine_in_float32(network, method="captured"):
    return GradientEngine(
        network, Architecture.of(network, SHAPE, N_CLASSES), GradientsConfig(method=method, dtype="float32")
    )


@pytest.mark.parametrize("share", [0.05, 0.003, 1e-4])
def test_what_a_graph_leaves_out_is_seen_in_float32_however_small_it_is(share):
    torch.manual_seed(0)
    network, (images, labels) = PartlyWithoutGradient(share), pairs()
    with pytest.raises(ConfigError, match="its graph does not give autograd's gradients"):
        engine_in_float32(network)(images, labels)
    found = engine_in_float32(network, "auto")(images, labels)
    for name, wanted in autograd_loop(network, images, labels).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-6)


def test_nothing_left_out_is_captured_in_float32():
    torch.manual_seed(0)
    network, (images, labels) = PartlyWithoutGradient(0.0), pairs()
    found = engine_in_float32(network)(images, labels)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    for name, wanted in autograd_loop(network, images, labels).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("names_it", [False, True])
def test_a_graph_is_traced_again_in_float64_only_if_it_names_its_precision(names_it, monkeypatch):
    traced = []

    class Counted(CapturedGradients):
        def __init__(self, *arguments):
            traced.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr("gitlight.gradients.engine.CapturedGradients", Counted)
    torch.manual_seed(0)
    network = Model(lambda model, x: (x.to(x.dtype) if names_it else x) * model.scale)
    images, labels = pairs()
    found = engine_in_float32(network)(images, labels)
    assert len(traced) == 1 + names_it
    for name, wanted in autograd_loop(network, images, labels).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-4, atol=1e-6)


def test_what_weights_of_zero_hide_is_seen_before_they_move():
    def branch(model, x):
        with torch.no_grad():
            factor = x.exp()
        return x + model.scale * factor * x

    torch.manual_seed(0)
    network = Model(branch)
    nn.init.zeros_(network.scale)
    engine, (images, labels) = engine_of(network), pairs()
    engine(images, labels)
    nn.init.constant_(network.scale, 0.5)
    found = engine(images, labels)
    assert_are_autograds(found, network, images, labels)


def test_weights_with_no_finite_gradient_beside_them_are_checked_where_they_are():
    torch.manual_seed(0)
    network = Model(lambda model, x: x * model.scale + torch.where(model.bound == 0, model.bound, torch.nan))
    network.bound = nn.Parameter(torch.zeros(()))
    assert_exact(network, method="captured")
