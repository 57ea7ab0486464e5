"""Every method, chunking and sketch against autograd in float64, for every leaked model; and updates of local steps."""

import copy
import itertools
import shutil

import pytest
import torch
from plain_autograd import plain_gradients, plain_updates, relative_error
from small_models import LARGE, SHAPE, SMALL, build
from torch import nn

from gitlight.config import GradientsConfig, SketchConfig, UpdatesConfig
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.memory import MemoryModel, functional_entries
from gitlight.gradients.sketch import Sketch
from gitlight.gradients.updates import LocalUpdates

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
# Activations are the models' own in float64. In float32 a ReLU that rounding switches is beyond any tolerance.
SMOOTH = {name: f"{name} tanh" for name in (*SMALL, *LARGE) if "resnet" in name or name == "custom"}


def in_precision(name, dtype):
    return SMOOTH.get(name, name) if dtype == "float32" else name


METHODS = ("captured", "vmap", "loop")
SKETCHES = {"whole": (False,), "sketched": (True,), "both": (False, True)}
CELLS = [
    (in_precision(name, dtype), method, n_images, dtype, "both")
    for name, dtype, method, n_images in itertools.product(SMALL, TOLERANCE, METHODS, (1, 3))
]
FEWEST = [("captured", 2, "float64", "sketched"), ("vmap", 2, "float32", "whole"), ("loop", 2, "float32", "sketched")]
OTHERS = [("captured", 1, "float32", "whole"), ("vmap", 1, "float64", "sketched"), ("loop", 1, "float64", "whole")]
CELLS += [(in_precision(name, cell[2]), *cell) for name in LARGE for cell in FEWEST]
CELLS += [(in_precision("torchvision_resnet18", cell[2]), *cell) for cell in OTHERS]


class Model:
    """A leaked model, leaks of it, and their gradients by autograd in float64, each made once."""

    def __init__(self, name, *activation):
        self.is_large = name in LARGE
        leaked = build(name, **dict(zip(["activation"], activation, strict=False)))
        self.network, self.architecture = leaked.network, leaked.architecture
        randomise_norms(self.network)
        self.chunkings = ([2], [1, 1]) if self.is_large else ([7], [4, 3])
        self._wanted = {}

    def leaks(self, n_images):
        generator, n_leaks = torch.Generator().manual_seed(n_images), sum(self.chunkings[0])
        images = torch.rand(n_leaks, n_images, *SHAPE, generator=generator)
        return images, torch.randint(10, (n_leaks, n_images), generator=generator)

    def wanted(self, n_images):
        if n_images not in self._wanted:
            self._wanted[n_images] = plain_gradients(self.reference(), *self.leaks(n_images))
        return self._wanted[n_images]

    def reference(self):
        return copy.deepcopy(self.network).double().requires_grad_(True)

    def sketch(self):
        # Of a large model one convolution and one linear layer: projections of all of it take long to draw.
        shapes = self.architecture.parameter_shapes
        few = [name for name, shape in shapes.items() if 5e4 < shape.numel() < 2.5e6][:2]
        kept = [name for name in shapes if name not in few] if self.is_large else None
        return Sketch(self.architecture, SketchConfig(name="count", size=16, keep_exact=kept))


def randomise_norms(network):
    """Statistics and scales that no shortcut gets right by chance."""
    torch.manual_seed(0)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)


@pytest.fixture(scope="module")
def model_of():
    kept = {}

    def model_of(name):
        if name not in kept:
            kept.clear()  # the gradients of large ones take gigabytes
            kept[name] = Model(*name.split())
        return kept[name]

    return model_of


class CountedEngine(GradientEngine):
    """Keeps what made each chunk, and how many leaks it had."""

    def __init__(self, model, settings, sketch):
        super().__init__(model.network, model.architecture, settings, sketch)
        self.made = []

    def use_graphs_of(self, other):
        """What is captured or compiled, which takes most of the time, and which a sketch is no part of."""
        self._captured, self._functional_gradients = other._captured, other._functional_gradients

    def _capturing(self, *given):
        return self._counted("captured", super()._capturing(*given))

    def _functional(self, *given):
        return self._counted(self._settings.method, super()._functional(*given))

    def _counted(self, method, make):
        def counted(images, labels, results):
            self.made.append((method, len(images)))
            make(images, labels, results)

        return counted


def check(model, method, n_images, dtype, sketches, chunkings):
    images, labels = model.leaks(n_images)
    settings = GradientsConfig(method=method, dtype=dtype)
    first = None
    for sketch in (model.sketch() if sketched else None for sketched in SKETCHES[sketches]):
        assert sketch is None or sketch.reductions
        wanted = model.wanted(n_images) if sketch is None else sketch(model.wanted(n_images))
        engine = CountedEngine(model, settings, sketch)
        first = first or engine
        engine.use_graphs_of(first)
        memory = MemoryModel.of(model.architecture, method, getattr(torch, dtype), sketch)
        for chunks in chunkings:
            n_leaks = sum(chunks)
            at_once = (chunks[0] + 0.5) * (memory.per_leak + n_images * memory.per_image)
            settings.memory_limit_gb = memory.entry_bytes * (2 * n_leaks * memory.result + memory.fixed + at_once) / 1e9
            engine.made.clear()
            found = engine(images[:n_leaks], labels[:n_leaks])
            assert engine.made == [(method, chunk) for chunk in chunks]
            assert all(gradient.dtype == getattr(torch, dtype) for gradient in found.values())
            assert relative_error(found, {name: g[:n_leaks] for name, g in wanted.items()}) < TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "method", "n_images", "dtype", "sketches"), CELLS)
def test_gradients_are_autograds(model_of, name, method, n_images, dtype, sketches):
    model = model_of(name)
    check(model, method, n_images, dtype, sketches, model.chunkings)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("n_images", "dtype"), [(1, "float64"), (3, "float32")])
def test_compiled_gradients_are_autograds(model_of, n_images, dtype):
    chunkings = ([3], [4, 3])  # one compilation, for four, serves all of them
    check(model_of("mlp"), "compiled", n_images, dtype, "both", chunkings)


class CountedUpdates(LocalUpdates):
    """Keeps how many clients each chunk had."""

    def __init__(self, *given):
        super().__init__(*given)
        self.made = []

    def _descend(self, *given):
        self.made.append(len(next(iter(given[-1].values()))))
        super()._descend(*given)


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        *(
            (in_precision(name, dtype), method, dtype)
            for name in SMALL
            for dtype in TOLERANCE
            for method in METHODS[1:]
        ),
        ("torchvision_resnet18", "vmap", "float64"),
        (SMOOTH["torchvision_resnet18"], "loop", "float32"),
    ],
)
def test_updates_are_those_of_plain_steps(model_of, name, method, dtype):
    model = model_of(name)
    # At large rates rounding grows from step to step: plain steps in float32 differ by 1e-4 in ResNet-20, too.
    steps = UpdatesConfig(epochs=2, batch_size=2, learning_rate=0.3 if dtype == "float64" else 1e-3)
    images, labels = model.leaks(3)
    seeds, sizes = torch.arange(len(images)), model.architecture
    wanted = plain_updates(model.reference(), images, labels, seeds, steps)
    settings = GradientsConfig(method=method, dtype=dtype, updates=steps)
    updates = CountedUpdates(model.network, sizes, settings)
    for chunks in model.chunkings:
        at_once = (chunks[0] + 0.5) * (4 * sizes.n_parameters + steps.batch_size * functional_entries(sizes))
        entries = 2 * len(images) * sizes.n_parameters + at_once
        settings.memory_limit_gb = getattr(torch, dtype).itemsize * entries / 1e9
        updates.made.clear()
        found = updates(images, labels, seeds)
        assert updates.made == (chunks if method == "vmap" else [1] * len(images))
        assert all(update.dtype == getattr(torch, dtype) for update in found.values())
        assert relative_error(found, wanted) < TOLERANCE[dtype]
