"""The memory that making leaks takes, measured in a process of its own, since peaks of one process add up.

The peak is /proc's VmHWM. getrusage's ru_maxrss is kept across fork and exec: in a process started by a large
pytest it is pytest's own.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.gradients.memory import MemoryModel, leaks_that_fit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")

COMMON = """
import sys, torch
from torch.nn.attention import SDPBackend
from gitlight.architecture import Architecture
from gitlight.config import (
    GaussianNoiseConfig, GradientsConfig, PruningConfig, SketchConfig, UpdatesConfig, ViTConfig
)
from gitlight.gradients import engine as engines
from gitlight.gradients.channel import build_channel, sent
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.sketch import Sketch
from gitlight.gradients.updates import LocalUpdates
from gitlight.leaked import LEAKED_MODELS
from gitlight.leaked.vit import vit

def memory(field):  # in GB, as the kernel counts this process alone
    line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e9

def small_images(n_leaks, n_images=1):
    return torch.rand(n_leaks, n_images, 3, 32, 32), torch.zeros(n_leaks, n_images, dtype=torch.int64)

def named(name):
    network = LEAKED_MODELS[name].load()(LEAKED_MODELS[name].settings(), (3, 32, 32), 10).eval()
    return network, Architecture.of(network, (3, 32, 32), 10)

def fine_grained(patch_size):  # with patches of two pixels, all but all of its memory is attention's scores
    settings = ViTConfig(patch_size=patch_size, hidden_size=16, heads=8, depth=2, mlp_size=16)
    network = vit(settings, (3, 32, 32), 10).eval()
    return network, Architecture.of(network, (3, 32, 32), 10)
"""

ENGINE = """
name, limit, n_leaks = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
network, architecture = named(name)
images, labels = small_images(n_leaks)
GradientEngine(network, architecture, GradientsConfig())(images[:2], labels[:2])  # what is loaded once does not count
before = memory("VmRSS")
gradients = GradientEngine(network, architecture, GradientsConfig(memory_limit_gb=limit))(images, labels)
print(memory("VmHWM") - before)
"""

ATTENTION = """
limit, n_leaks = float(sys.argv[1]), int(sys.argv[2])
engines._attention = lambda device_type: [SDPBackend.MATH]  # as on GPUs
images, labels = small_images(n_leaks)
GradientEngine(*fine_grained(8), GradientsConfig())(images[:2], labels[:2])
engine = GradientEngine(*fine_grained(2), GradientsConfig(memory_limit_gb=limit))
engine(images[:1], labels[:1])  # compared with autograd, once
before = memory("VmRSS")
engine(images, labels)
print(memory("VmHWM") - before)
"""

UPDATES = """
limit, n_leaks = float(sys.argv[1]), int(sys.argv[2])
images, labels = small_images(n_leaks, 2)
def updates(network, architecture):
    return LocalUpdates(network, architecture, GradientsConfig(memory_limit_gb=limit, updates=UpdatesConfig(epochs=2)))
updates(*fine_grained(8))(images[:1], labels[:1], torch.arange(1))
made = updates(*fine_grained(2))
before = memory("VmRSS")
made(images, labels, torch.arange(n_leaks))
print(memory("VmHWM") - before)
"""

LOOP = """
method, limit, n_leaks = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
network, architecture = named("lenet")
images, labels = small_images(n_leaks)
def made_by(limit):
    settings = GradientsConfig(memory_limit_gb=limit, updates=UpdatesConfig(epochs=2))
    if method == "updates":
        updates = LocalUpdates(network, architecture, settings)
        return lambda images, labels: updates(images, labels, torch.arange(len(images)))
    return GradientEngine(network, architecture, settings)
made_by(2)(images[:2], labels[:2])
make = made_by(limit)
before = memory("VmRSS")
for _ in range(4):
    gradients = make(images, labels)  # the last is held until the next is there
print(memory("VmHWM") - before)
"""

CHANNEL = """
stage, limit, n_leaks = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
network, architecture = named("lenet")
images, labels = small_images(n_leaks)
stages = build_channel([GaussianNoiseConfig() if stage == "noise" else PruningConfig()] if stage != "sketch" else [])
sketch = Sketch(architecture, SketchConfig(name="count", size=64)) if stage == "sketch" else None
GradientEngine(network, architecture, GradientsConfig())(images[:2], labels[:2])
engine = GradientEngine(network, architecture, GradientsConfig(memory_limit_gb=limit))
before = memory("VmRSS")
for _ in range(3):
    gradients = sent(engine(images, labels), torch.arange(n_leaks), stages, sketch, limit)
print(memory("VmHWM") - before)
"""


def peak(script, *arguments):
    """What a script printed: the memory, in GB, that making leaks took at most."""
    command = [sys.executable, "-c", COMMON + script, *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.parametrize(
    ("name", "limit", "n_leaks"),
    [("lenet", 0.2, 2048), ("lenet", 0.5, 2048), ("resnet20", 0.3, 96), ("vit", 0.5, 32)],
)
def test_making_gradients_stays_within_the_limit(name, limit, n_leaks):
    # The gradients themselves are a third of the limit and more; the allocator's rounding gets a tenth.
    assert 0.3 * limit < peak(ENGINE, name, limit, n_leaks) < 1.1 * limit


@pytest.mark.parametrize(("script", "n_leaks"), [(ATTENTION, 32), (UPDATES, 12)], ids=["captured", "updates"])
def test_attention_scores_are_within_the_limit(script, n_leaks):
    assert 0.3 * 0.15 < peak(script, 0.15, n_leaks) < 1.1 * 0.15


@pytest.mark.parametrize(("method", "limit"), [("captured", 0.15), ("updates", 0.2)])
def test_a_loop_that_holds_the_last_result_stays_within_the_limit(method, limit):
    assert 0.6 * limit < peak(LOOP, method, limit, 1024) < 1.1 * limit


@pytest.mark.parametrize("stage", ["noise", "pruning", "sketch"])
def test_channels_and_sketches_after_them_stay_within_the_limit(stage):
    assert 0.6 * 0.2 < peak(CHANNEL, stage, 0.2, 1024) < 1.1 * 0.2


def test_room_for_a_second_result_is_left_where_there_is_any():
    assert leaks_that_fit(100, results=30, fixed=5, each=10) == 3
    assert leaks_that_fit(75, results=30, fixed=5, each=10) == 1
    assert leaks_that_fit(74, results=30, fixed=5, each=10) == 3, "of a single call"
    assert leaks_that_fit(45, results=30, fixed=5, each=10) == 1
    assert leaks_that_fit(44, results=30, fixed=5, each=10) == 0


def test_a_layer_that_is_used_again_has_its_gradients_twice():
    def model(n_layers):
        layer = nn.Linear(48, 48)
        network = nn.Sequential(nn.Flatten(), *[layer] * n_layers, nn.Linear(48, 10))
        return MemoryModel.of(Architecture.of(network, (3, 4, 4), 10), "captured", torch.float32, None)

    assert model(1).per_leak == 0
    assert model(3).per_leak == 48 * 48
