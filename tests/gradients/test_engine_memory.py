"""The engine's memory, measured in a process of its own, since peaks of one process add up.

The peak is /proc's VmHWM. getrusage's ru_maxrss is kept across fork and exec: in a process started by a large
pytest it is pytest's own.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn

from gitlight.architecture import Architecture
from gitlight.gradients.memory import MemoryModel

MEASURE = """
import sys, torch
from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig
from gitlight.gradients.engine import GradientEngine
from gitlight.leaked import LEAKED_MODELS

def memory(field):  # in GB, as the kernel counts this process alone
    line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e9

name, limit, n_leaks = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
network = LEAKED_MODELS[name].load()(LEAKED_MODELS[name].settings(), (3, 32, 32), 10).eval()
architecture = Architecture.of(network, (3, 32, 32), 10)
images, labels = torch.rand(n_leaks, 1, 3, 32, 32), torch.zeros(n_leaks, 1, dtype=torch.int64)
GradientEngine(network, architecture, GradientsConfig())(images[:2], labels[:2])  # what is loaded once does not count
before = memory("VmRSS")
gradients = GradientEngine(network, architecture, GradientsConfig(memory_limit_gb=limit))(images, labels)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("name", "limit", "n_leaks"),
    [("lenet", 0.2, 2048), ("lenet", 0.5, 2048), ("resnet20", 0.3, 96), ("vit", 0.5, 32)],
)
def test_making_gradients_stays_within_the_limit(name, limit, n_leaks):
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, name, str(limit), str(n_leaks)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # The gradients themselves are a third of the limit and more; the allocator's rounding gets a tenth.
    assert 0.3 * limit < float(result.stdout) < 1.1 * limit


def test_a_layer_that_is_used_again_has_its_gradients_twice():
    def model(n_layers):
        layer = nn.Linear(48, 48)
        network = nn.Sequential(nn.Flatten(), *[layer] * n_layers, nn.Linear(48, 10))
        return MemoryModel.of(Architecture.of(network, (3, 4, 4), 10), "captured", torch.float32, None)

    assert model(1).per_leak == 0
    assert model(3).per_leak == 48 * 48
