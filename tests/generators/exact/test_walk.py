import pytest
import torch
from closed_form import add
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import FullyConnectedConfig, LeNetConfig
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.walk import ExactWalk
from gitlight.generators.exact.weights import WeightFit, output_logits

DAMPING = 1e-12
FULL_SIZE = (3, 32, 32)  # smaller images have fewer unknowns, and the walk goes further


def fitted_walk(leaked, pair, **changed):
    walk = ExactWalk(leaked.architecture, **{"damping": DAMPING, "depth": None, "client_batch_size": 1, **changed})
    for fit in walk.fits():
        add(fit, pair)
        fit.finish()
    return walk


def true_inputs(leaked, pair, names):
    """What each layer really received, by forward hooks, float64."""
    found = {}
    network = leaked.network.double()
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name in names
    ]
    network(pair.images[:, 0].double())
    for handle in handles:
        handle.remove()
    return found


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("activation", "init"), [("sigmoid", "uniform"), ("leaky_relu", "default"), ("tanh", "default")]
)
def test_lenet_is_walked_down_to_where_the_equations_end(make_pairs, activation, init):
    leaked, pair = make_pairs(LeNetConfig(width=6, activation=activation, init=init), n=600, shape=FULL_SIZE)
    walk = fitted_walk(leaked, pair)
    assert [(feature.name, feature.exact) for feature in walk.features] == [
        ("input of linear", True),
        ("input of conv3", True),
        ("input of conv2", False),
    ]
    assert "rank" in walk.end
    pre_activations = true_inputs(leaked, pair, ["activation3", "activation2", "conv2"])
    third, second, first = walk(pair.gradients)
    assert relative(third, pre_activations["activation3"]) < 1e-8
    assert relative(second, pre_activations["activation2"]) < 1e-5
    assert first.shape == pre_activations["conv2"].shape
    assert relative(first, pre_activations["conv2"]) < 1, "of least norm: it has the determined part, and no more"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 2e-2)])
def test_the_weights_that_carry_delta_are_found_from_pairs_alone(make_pairs, dtype, tolerance):
    leaked, pair = make_pairs(LeNetConfig(width=6), n=600, dtype=dtype, shape=FULL_SIZE)
    estimates = fitted_walk(leaked, pair).estimated_parameters()
    truth = dict(leaked.network.named_parameters())
    assert list(estimates) == ["linear.weight", "conv3.weight"]
    last = truth["linear.weight"].double()
    assert estimates["linear.weight"].up_to_common_row
    assert relative(estimates["linear.weight"].value, last - last.mean(dim=0)) < tolerance
    assert relative(estimates["conv3.weight"].value, truth["conv3.weight"].double()) < tolerance


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "gelu"])
def test_fully_connected_networks_give_the_image_itself(make_pairs, activation):
    leaked, pair = make_pairs(FullyConnectedConfig(hidden_sizes=[20, 10], activation=activation))
    walk = fitted_walk(leaked, pair)
    assert walk.reaches_the_image
    assert walk.end == "the image is reached"
    assert not walk.estimated_parameters(), "every layer's own bias gives its δ: no weight is needed"
    assert relative(walk(pair.gradients)[-1], pair.images[:, 0].double()) < 1e-9


def test_relu_ends_the_walk_below_the_first_hidden_layer(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=6, activation="relu"), n=150)
    walk = fitted_walk(leaked, pair)
    assert [feature.name for feature in walk.features] == ["input of linear", "input of conv3"]
    assert "weight of 'conv3' cannot be fitted" in walk.end
    third = true_inputs(leaked, pair, ["linear"])["linear"]
    assert relative(walk(pair.gradients)[0].flatten(1), third) < 1e-8


def test_depth_limits_the_walk(make_pairs):
    leaked, _ = make_pairs(LeNetConfig(width=12))
    walk = ExactWalk(leaked.architecture, DAMPING, 1, 1)
    assert [feature.name for feature in walk.features] == ["input of linear"]
    assert walk.fits() == []
    assert "exact_depth" in walk.end


def test_client_batches_give_averages_and_say_that_they_are_not_exact(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=12), client_batch_size=3)
    walk = ExactWalk(leaked.architecture, DAMPING, None, 3)
    assert [feature.exact for feature in walk.features] == [False]
    assert "3 images per leak" in walk.end
    assert torch.isfinite(walk(pair.gradients)[0]).all()


def test_leaks_that_are_zero_or_broken_do_not_touch_the_others(make_pairs):
    leaked, pair = make_pairs(LeNetConfig(width=6), n=150)
    walk = fitted_walk(leaked, pair)
    wanted = walk(pair.gradients)
    broken = {name: gradient.clone() for name, gradient in pair.gradients.items()}
    for gradient in broken.values():
        gradient[0], gradient[1] = 0, float("nan")
    for found, alone in zip(walk(broken), wanted, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found[2:], alone[2:])


@pytest.mark.parametrize("head", [nn.Linear(12, 2, bias=False), nn.Sequential(nn.Linear(12, 2), nn.Sigmoid())])
def test_a_model_without_a_last_linear_layer_with_bias_is_named(head):
    architecture = Architecture.of(nn.Sequential(nn.Flatten(), head), (3, 2, 2), 2)
    with pytest.raises(ArchitectureError, match=r"hybrid starts from .* generator.name=coarse"):
        ExactWalk(architecture, DAMPING, None, 1)


def test_a_layer_without_a_rule_ends_the_walk_with_its_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 2))
    walk = ExactWalk(Architecture.of(model, (3, 8, 8), 2), DAMPING, None, 1)
    assert [feature.name for feature in walk.features] == ["input of 4"]
    assert walk.end == "there is no rule for BatchNorm2d, module '1'"


def test_logits_follow_from_the_output_error():
    logits = torch.randn(50, 7, dtype=torch.float64) * 3
    labels = torch.randint(7, (50,))
    delta = logits.softmax(dim=1) - nn.functional.one_hot(labels, 7)
    found, weights = output_logits(delta, torch.float64)
    torch.testing.assert_close(found, logits - logits.mean(dim=1, keepdim=True), rtol=1e-8, atol=1e-8)
    assert (weights > 0).all()
    _, weights = output_logits(torch.full((1, 7), float("nan"), dtype=torch.float64), torch.float64)
    assert (weights == 0).all()


def test_weight_fit_is_weighted_least_squares():
    torch.manual_seed(0)
    patches, outputs = torch.randn(20, 3, 4, dtype=torch.float64), torch.randn(20, 3, 2, dtype=torch.float64)
    weights = torch.rand(20, dtype=torch.float64)
    fit = WeightFit()
    fit.add(patches[:5], outputs[:5], weights[:5])
    fit.add(patches[5:], outputs[5:], weights[5:])
    weight, bias = fit.solve()
    root = weights.sqrt()[:, None, None]
    design = torch.cat([patches, torch.ones(20, 3, 1, dtype=torch.float64)], dim=2)
    wanted = torch.linalg.lstsq((design * root).flatten(0, 1), (outputs * root).flatten(0, 1)).solution
    torch.testing.assert_close(torch.cat([weight.T, bias[None]]), wanted)
