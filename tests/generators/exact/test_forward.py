"""The leaked model's passes with estimated weights, against the model itself."""

import pytest
import torch
import torchvision
from torch import nn

from gitlight.architecture import IMAGE, Architecture
from gitlight.generators.exact.forward import forward_values, gradient_mismatch

SHAPE, N_CLASSES = (3, 8, 8), 5


class Residual(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.head = nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Linear(4, N_CLASSES)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        joined = self.second(x)
        joined += x
        return self.head(self.relu(joined).mean((2, 3)))


def vision_transformer():
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12, "num_classes": N_CLASSES}
    model = torchvision.models.VisionTransformer(image_size=8, patch_size=4, **sizes)
    nn.init.normal_(model.heads.head.weight)
    return model


class Chunks(nn.Module):
    """An operation with several results in the middle."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(72, N_CLASSES)

    def forward(self, x):
        first, second = self.conv(x).chunk(2, dim=1)
        return self.head((first * second).flatten(1))


MODELS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, N_CLASSES)),
    "in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(192, N_CLASSES)),
    "residual": lambda: Residual(inplace=False),
    "residual, in place": lambda: Residual(inplace=True),
    "vision transformer": vision_transformer,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double().eval()


def known(model):
    tensors = model.state_dict().items()
    return {name: tensor for name, tensor in tensors if tensor.is_floating_point()}


def test_the_logits_are_those_of_the_model(model):
    architecture = Architecture.of(model, SHAPE, N_CLASSES)
    images = torch.rand(3, *SHAPE, dtype=torch.float64) - 0.5
    before = images.clone()
    values = forward_values(architecture, images, known(model))
    assert torch.equal(images, before)
    assert torch.equal(values[IMAGE], before)
    assert set(values) == {IMAGE, *(layer.name for layer in architecture.layers)}
    torch.testing.assert_close(values[architecture.output], model(before).detach())


def test_hidden_results_are_those_of_the_models_modules(model):
    architecture = Architecture.of(model, SHAPE, N_CLASSES)
    images = torch.rand(3, *SHAPE, dtype=torch.float64) - 0.5
    values = forward_values(architecture, images.clone(), known(model))
    seen = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: seen.update({name: output.clone()})
            )
    model(images.clone())
    compared = [name for name in seen if name in values]
    assert len(compared) > 2
    for name in compared:
        torch.testing.assert_close(values[name], seen[name].detach().reshape(values[name].shape))


def test_what_needs_an_unknown_weight_is_left_out():
    model = MODELS["residual"]().double().eval()
    architecture = Architecture.of(model, SHAPE, N_CLASSES)
    weights = known(model)
    del weights["second.bias"]
    values = forward_values(architecture, torch.rand(2, *SHAPE), weights)
    assert {"first", "norm"} < set(values)
    assert not {"second", "head"} & set(values)
    assert values["norm"].dtype == torch.float64


def test_what_follows_an_operation_with_several_results_is_left_out():
    model = Chunks().double()
    values = forward_values(Architecture.of(model, SHAPE, N_CLASSES), torch.rand(2, *SHAPE), known(model))
    assert set(values) == {IMAGE, "conv"}


def leaks(model, images, labels):
    """Gradients of each image by autograd."""
    parameters = dict(model.named_parameters())
    made = []
    for image, label in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(model(image.unsqueeze(0)), label.unsqueeze(0))
        made.append(torch.autograd.grad(loss, list(parameters.values())))
    return {name: torch.stack(its) for name, its in zip(parameters, zip(*made, strict=True), strict=True)}


@pytest.fixture(params=["plain", "in place", "vision transformer"])
def leaked(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().double().eval()
    images, labels = torch.rand(3, *SHAPE, dtype=torch.float64), torch.randint(N_CLASSES, (3,))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    architecture = Architecture.of(model, SHAPE, N_CLASSES)
    return model, architecture, images, labels, leaks(model, images.clone(), labels), weights


def test_the_true_image_gives_the_leaked_gradient(leaked):
    _, architecture, images, labels, gradients, weights = leaked
    before = images.clone()
    assert (gradient_mismatch(architecture, images, labels, gradients, weights) < 1e-12).all()
    assert torch.equal(images, before)


def test_another_image_is_as_far_as_autograd_says(leaked):
    model, architecture, images, labels, gradients, weights = leaked
    others = torch.rand_like(images)
    made = leaks(model, others.clone(), labels)
    distance, size = (
        torch.cat([gradient.flatten(1) for gradient in whose.values()], dim=1).norm(dim=1)
        for whose in ({name: made[name] - gradients[name] for name in made}, gradients)
    )
    torch.testing.assert_close(gradient_mismatch(architecture, others, labels, gradients, weights), distance / size)


def test_a_wrong_label_shows():
    model = MODELS["plain"]().double()
    images, labels = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2])
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    architecture = Architecture.of(model, SHAPE, N_CLASSES)
    found = gradient_mismatch(architecture, images, torch.tensor([0, 1, 3]), leaks(model, images, labels), weights)
    assert (found > 0.1).tolist() == [False, False, True]
