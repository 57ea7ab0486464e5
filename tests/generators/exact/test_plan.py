"""What a plan claims, against what a walk with the true weights finds in the model's own values."""

import copy

import pytest
import torch
import torchvision
from dense import relative
from torch import nn
from torch.nn import functional as F

from gitlight.architecture import IMAGE, Architecture
from gitlight.errors import ArchitectureError
from gitlight.generators.exact.plan import plan_walk, rules_of
from gitlight.generators.exact.solvability import Do, Known
from gitlight.generators.exact.walk import walk

SHAPE, N_CLASSES = (3, 8, 8), 5


class Plus(nn.Module):
    """A convolution, something added to it, and a linear head."""

    def __init__(self, added):
        super().__init__()
        self.conv, self.activation, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Tanh(), nn.Linear(768, N_CLASSES)
        if isinstance(added, float | nn.Parameter):
            self.added = added
        else:
            self.register_buffer("added", added)

    def forward(self, x):
        return self.head(self.activation(self.conv(x) + self.added).flatten(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.activation, self.head = nn.Tanh(), nn.Linear(768, N_CLASSES)

    def forward(self, x):
        x = self.conv(x)
        return self.head(self.activation(x + self.inner(x)).flatten(1))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.activation, self.head = nn.Linear(192, 192), nn.Sigmoid(), nn.Linear(192, N_CLASSES)

    def forward(self, x):
        for _ in range(2):
            x = self.activation(self.layer(x.flatten(1)))
        return self.head(x)


def convolutional(activation, width=12, stride=1):
    size = 64 // stride**4
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride, 1), activation, nn.Conv2d(width, width, 3, stride, 1), copy.deepcopy(activation),
        nn.Flatten(), nn.Linear(width * size, N_CLASSES),
    )  # fmt: skip


def fully_connected(activation):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), activation, nn.Linear(8, N_CLASSES))


def vision_transformer():
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12, "num_classes": N_CLASSES}
    model = torchvision.models.VisionTransformer(image_size=8, patch_size=4, **sizes)
    nn.init.normal_(model.heads.head.weight)
    return model


def structure(model, shape=SHAPE):
    architecture = Architecture.of(model, shape, N_CLASSES)
    return architecture, rules_of(architecture, strict=False)


def plan_of(model, weights=None, n_images=1):
    architecture, rules = structure(model)
    names = architecture.parameter_shapes if weights is None else weights
    return plan_walk(architecture, rules, names, n_images)


def walked(model, n=3):
    """The plan with true weights, what a walk finds, and the true results of modules; float64."""
    torch.manual_seed(0)
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    architecture, rules = structure(model)
    plan = plan_walk(architecture, rules, architecture.parameter_shapes, 1)
    parameters = dict(model.named_parameters())
    images, gradients, truth = torch.rand(n, *SHAPE, dtype=torch.float64), [], {}
    for image in images:
        loss = nn.functional.cross_entropy(model(image[None]), torch.randint(N_CLASSES, (1,)))
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    stacked = {name: torch.stack(its) for name, its in zip(parameters, zip(*gradients, strict=True), strict=True)}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _module, _inputs, output, name=name: truth.update({name: output}))
    with torch.no_grad():
        model(images.clone())
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    found = walk(architecture, rules, plan, stacked, torch.full((n,), 1e-15).double(), weights, {})
    return plan, found, truth | {IMAGE: images}


def assert_exact_is_exact(model, at_least):
    plan, found, truth = walked(model)
    exact = {name for name, how in plan.known.items() if how is Known.EXACT}
    assert exact >= set(at_least)
    for name in exact & set(truth):
        assert relative(found.values[name].value, truth[name].reshape(found.values[name].value.shape)) < 1e-5, name


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.LeakyReLU(0.2), nn.ReLU()], ids=repr)
def test_what_is_called_exact_in_a_convolutional_network_is_exact(activation):
    assert_exact_is_exact(convolutional(activation), {IMAGE, "1", "3"})


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.GELU(), nn.SiLU()], ids=repr)
def test_biases_of_a_fully_connected_network_make_the_image_exact(activation):
    assert_exact_is_exact(fully_connected(activation), {IMAGE, "2"})


def test_forward_equations_make_a_strided_network_exact():
    model = convolutional(nn.Tanh(), stride=2)
    assert plan_of(model, weights=()).known.get(IMAGE) is None
    assert_exact_is_exact(model, {IMAGE, "1", "3"})


def test_an_added_parameter_makes_what_is_below_it_exact():
    assert_exact_is_exact(Plus(nn.Parameter(torch.rand(1, 12, 8, 8))), {IMAGE, "conv"})
    # Without any weight: δ of the sum is revealed, and the convolution's own gradient equations suffice.
    assert plan_of(Plus(nn.Parameter(torch.rand(1, 12, 8, 8))), weights=()).known[IMAGE] is Known.EXACT


def test_a_position_embedding_makes_the_patches_of_a_vision_transformer_exact():
    plan, found, truth = walked(vision_transformer())
    assert plan.known[IMAGE] is Known.EXACT
    assert relative(found.values[IMAGE].value, truth[IMAGE]) < 1e-8


def test_a_residual_join_ends_the_walk_with_the_reason():
    plan = plan_of(Residual())
    assert {"conv", "inner"} <= plan.deltas, "δ passes both branches"
    assert plan.known[IMAGE] is Known.EXACT, "gradient equations need nothing but δ"
    without = plan_of(Residual(), weights=("head.weight", "head.bias"))
    assert "inner" not in without.obstacles
    assert "inner.weight" in without.obstacles["conv"]


def test_a_layer_whose_delta_is_not_carried_says_which_weight_is_missing():
    plan = plan_of(convolutional(nn.Tanh()), weights=())
    assert plan.known["4"] is Known.EXACT
    assert plan.obstacles == {
        "2": "5.weight of linear '5' is not known",
        "0": "5.weight of linear '5' is not known",
    }


def test_nothing_is_carried_below_an_average_over_several_images():
    plan = plan_of(convolutional(nn.Tanh()), n_images=4)
    assert plan.known["4"] is Known.ESTIMATE
    assert not any(action.do is Do.CARRY for action in plan.actions)
    assert plan.obstacles["2"] == "with 4 images per leak, δ is not known below linear '5'"


def separated_plan(model, n_images, shape=SHAPE, weights=None):
    architecture, rules = structure(model, shape)
    names = architecture.parameter_shapes if weights is None else weights
    return plan_walk(architecture, rules, names, n_images, stacked=False, separated=True)


@pytest.mark.parametrize(("n_images", "known"), [(2, Known.EXACT), (4, Known.CLOSE)])
def test_images_that_are_told_apart_are_solved_for_together(n_images, known):
    # Twelve channels of 3×3 kernels: 108 equations for the 36 unknowns of an image in each channel of the second input.
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Tanh(), nn.Conv2d(12, 12, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(432, 5)
    )
    plan = separated_plan(model, n_images)
    assert plan.known["4"] is Known.EXACT
    assert plan.known["1"] is known
    assert plan.known["0"] is known
    assert plan.known[IMAGE] is Known.CLOSE, (
        "108 equations for 64 unknowns of each image, but 432 outputs for 192 pixels"
    )
    assert "0" in plan.deltas
    # The gradients of single images give that layer's input, which a regression is made of; weights below need not.
    assert separated_plan(model, n_images, weights=("5.weight", "5.bias")).known["1"] is known


def test_a_fully_connected_network_gives_all_images_of_a_client_batch():
    for activation in (nn.Tanh(), nn.ReLU()):
        plan = separated_plan(fully_connected(activation), 4)
        assert plan.known[IMAGE] is Known.EXACT
        # Only the last layer's δ is found by separation: below, a bias' gradient is that of several images.
        assert [action.layer.name for action in plan.actions if action.do is Do.REVEAL] == ["3"]
    without = separated_plan(fully_connected(nn.Tanh()), 4, weights=())
    assert without.obstacles["1"] == "3.weight of linear '3' is not known"


def test_groups_are_not_solved_for_together():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, N_CLASSES))
    plan = separated_plan(model, 2, shape=(4, 3, 3))
    assert plan.obstacles["0"] == "its weight has 2 groups"


def test_a_plan_cut_to_all_it_solves_for_carries_nothing_further():
    plan = separated_plan(convolutional(nn.Tanh()), 2)
    cut = plan.first(len(plan.solves))
    assert cut.solves == plan.solves
    assert cut.actions[-1].do is not Do.CARRY
    assert cut.first(len(plan.solves) + 1) is cut


def test_a_plan_up_to_some_results_ends_with_the_last_of_them():
    plan = separated_plan(convolutional(nn.Tanh()), 2)
    middle = plan.solves[1].layer
    assert plan.up_to(middle.inputs).actions[-1] == plan.solves[1]
    for cut, do in ((plan.up_to([], [middle.name]), Do.CARRY), (plan.up_to([middle.name]), Do.INVERT)):
        assert (cut.actions[-1].do, cut.actions[-1].layer.inputs[0]) == (do, middle.name)
    assert plan.up_to(middle.inputs, [middle.name]).actions == plan.up_to(middle.inputs).actions
    assert plan.up_to(plan.known, plan.deltas).actions == plan.actions
    assert plan.up_to(["never found"]).actions == ()


def test_max_pooling_ends_the_walk_with_the_reason():
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, N_CLASSES)]
    plan = plan_of(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.Tanh(), *head))
    assert plan.obstacles["0"] == "the input of max_pool2d '2', which δ needs to pass it, is not known"


def test_an_operation_without_a_rule_is_named_or_ends_the_walk():
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Hardshrink(), nn.Flatten(), nn.Linear(432, N_CLASSES))
    architecture = Architecture.of(model, SHAPE, N_CLASSES)
    with pytest.raises(ArchitectureError, match="hardshrink '1'"):
        rules_of(architecture, strict=True)
    assert plan_of(model).obstacles["0"] == "there is no inverse rule for hardshrink '1'"
    assert plan_of(model).known["1"] is Known.EXACT


def test_a_head_without_bias_hides_delta():
    plan = plan_of(nn.Sequential(nn.Flatten(), nn.Linear(192, N_CLASSES, bias=False)))
    assert not plan.known
    assert plan.obstacles["1"] == "δ of its output is not known"


def test_every_action_comes_after_what_it_needs():
    for model in (convolutional(nn.Tanh(), stride=2), Residual(), vision_transformer()):
        plan, known, deltas = plan_of(model), set(), set()
        for do, layer, position in ((action.do, action.layer, action.position) for action in plan.actions):
            if do is Do.REVEAL:
                deltas.add(layer.name)
            elif do is Do.CARRY:
                assert layer.name in deltas
                deltas.add(layer.inputs[position])
            else:
                assert layer.name in (known if do is Do.INVERT else deltas)
                known.add(layer.inputs[position])
        assert known == set(plan.known)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU()], ids=repr)
def test_an_activation_with_a_minimum_leaves_nothing_exact_below_it(activation):
    assert_exact_is_exact(convolutional(activation), {"3"})


def test_a_layer_used_twice_is_not_called_exact():
    assert_exact_is_exact(Twice(), ())


@pytest.mark.parametrize("added", [1.5, torch.rand(1, 12, 8, 8)], ids=type)
def test_a_number_or_buffer_that_is_added_does_not_stop_the_walk(added):
    assert_exact_is_exact(Plus(added), {"activation"})


def test_a_parameter_added_to_many_entries_reveals_no_delta():
    assert_exact_is_exact(Plus(nn.Parameter(torch.rand(1, 12, 1, 1))), {"activation"})


class StandardisedConv(nn.Conv2d):
    """Its kernels are standardised before an image meets them (Qiao et al. 2019)."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias)


def test_what_is_computed_from_parameters_alone_needs_no_rule():
    network = nn.Sequential(StandardisedConv(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    architecture = Architecture.of(network, (3, 8, 8), 5)
    rules = rules_of(architecture, strict=False)
    plan = plan_walk(architecture, rules, (), 1)
    assert {architecture[name].kind for name in rules} >= {"mean", "std", "conv2d", "linear"}
    assert [action.layer.name for action in plan.solves] == ["3"]
