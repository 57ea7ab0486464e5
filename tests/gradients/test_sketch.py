import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import ExactGeneratorConfig, LeNetConfig, MLPGeneratorConfig, SketchConfig
from gitlight.errors import ConfigError
from gitlight.generators.exact.generator import ExactGenerator
from gitlight.generators.mlp import MLPGenerator
from gitlight.gradients.sketch import Sketch
from gitlight.leaked.lenet import lenet

SHAPE = (3, 16, 16)
SETTINGS = SketchConfig(name="count", size=64)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return lenet(LeNetConfig(width=4), SHAPE, 10)


@pytest.fixture
def architecture(network):
    return Architecture.of(network, SHAPE, 10)


def drawn(architecture, n_leaks=3):
    return {
        name: torch.randn(n_leaks, *shape, dtype=torch.float64) for name, shape in architecture.parameter_shapes.items()
    }


def test_weights_are_sketched_and_the_last_layer_and_biases_are_kept(architecture):
    shapes = Sketch(architecture, SETTINGS).shapes
    assert list(shapes) == list(architecture.parameter_shapes)
    for name, shape in architecture.parameter_shapes.items():
        assert shapes[name] == ((64,) if name.startswith("conv") and name.endswith("weight") else shape)


class Positions(nn.Module):
    """Embeddings that are repeated and cut, a norm over maps, a head of weights by length, a temperature."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(48, 48)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 48)), nn.Parameter(torch.randn(1, 80, 48))
        self.norm = nn.LayerNorm([17, 48])
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(48, 10))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, images):
        patches = self.inner(images.flatten(1).view(len(images), 16, 48))
        tokens = torch.cat([self.token.repeat(images.shape[0], 1, 1), patches], dim=1)
        return self.head(self.norm(tokens + self.positions[:, :17]).mean(1)) / self.temperature


def test_embeddings_biases_and_the_last_layer_are_kept_in_whatever_form_they_come():
    architecture = Architecture.of(Positions(), SHAPE, 10)
    shapes, whole = Sketch(architecture, SketchConfig(name="count", size=16)).shapes, architecture.parameter_shapes
    assert {name for name, shape in shapes.items() if shape != whole[name]} == {"inner.weight", "norm.weight"}


def test_patterns_choose_what_is_kept(architecture):
    settings = SketchConfig(name="count", size=64, keep_exact=["conv1.*"])
    shapes = Sketch(architecture, settings).shapes
    assert shapes["conv1.weight"] == (4, 3, 5, 5)
    assert shapes["linear.weight"] == (64,)
    with pytest.raises(ConfigError, match=r"gradients.sketch.keep_exact: 'head.\*' fits no parameter.*conv1.weight"):
        Sketch(architecture, SketchConfig(name="count", keep_exact=["head.*"]))


def test_a_sketch_is_linear_and_keeps_the_norm_in_expectation(architecture):
    sketch, left, right = Sketch(architecture, SETTINGS), drawn(architecture), drawn(architecture)
    mixed = sketch({name: 2 * left[name] - right[name] for name in left})
    for name in left:
        torch.testing.assert_close(mixed[name], 2 * sketch(left)[name] - sketch(right)[name])
    many = [Sketch(architecture, SketchConfig(name="count", size=64, seed=seed)) for seed in range(200)]
    squares = torch.stack([other(left)["conv2.weight"].square().sum(1) for other in many]).mean(0)
    torch.testing.assert_close(squares, left["conv2.weight"].flatten(1).square().sum(1), rtol=0.1, atol=0)


def test_a_sketch_depends_on_its_seed_alone(architecture):
    gradients = drawn(architecture)
    first, again = Sketch(architecture, SETTINGS), Sketch(architecture, SETTINGS)
    other = Sketch(architecture, SketchConfig(name="count", size=64, seed=1))
    torch.manual_seed(5)
    assert torch.equal(first(gradients)["conv2.weight"], again(gradients)["conv2.weight"])
    assert first.digest == again.digest != other.digest


def test_a_sketch_is_a_matrix_with_one_sign_for_each_entry(architecture):
    sketch, gradients = Sketch(architecture, SETTINGS), drawn(architecture)
    for name, reduce in sketch.reductions.items():
        shape = architecture.parameter_shapes[name]
        matrix = reduce(torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape))
        assert torch.equal(matrix.abs().sum(1), torch.ones(len(matrix)).double())
        assert set(matrix.unique().tolist()) == {-1, 0, 1}
        per_place = matrix.abs().sum(0)
        assert per_place.max() - per_place.min() <= 1
        torch.testing.assert_close(sketch(gradients)[name], gradients[name].flatten(1) @ matrix)


def test_generators_take_sketches_or_say_that_they_cannot(architecture):
    sketch = Sketch(architecture, SETTINGS)
    seen = sketch.seen_by_generators(architecture)
    generator = MLPGenerator(seen, MLPGeneratorConfig(hidden_size=8))
    gradients = {name: gradient.float() for name, gradient in sketch(drawn(architecture)).items()}
    assert generator(gradients).shape == (3, 1, *SHAPE)
    with pytest.raises(ConfigError, match=r"gradients.sketch.name.*whole gradients"):
        ExactGenerator(seen, ExactGeneratorConfig())


def test_a_generator_does_not_load_the_state_of_another_sketch(architecture):
    made = []
    for seed in (0, 0, 1):
        sketch = Sketch(architecture, SketchConfig(name="count", size=64, seed=seed))
        made.append(MLPGenerator(sketch.seen_by_generators(architecture), MLPGeneratorConfig(hidden_size=8)))
    made[1].load_state_dict(made[0].state_dict())
    with pytest.raises(RuntimeError, match=r"gradients.sketch is not the one"):
        made[2].load_state_dict(made[0].state_dict())
