"""Pairs per second and peak memory of each way to make gradients: ``python benchmarks/gradients.py [MODEL ...]``.

Columns: (a) a loop of backward passes of one image, the way of the published LTI code; (b) ``torch.func.vmap(grad)``;
(c) Opacus' ``GradSampleModule``, where the extra ``benchmarks`` is installed; ours, ``gradients.method=captured``; and
(d) one ordinary backward pass of the whole batch, which makes no gradients per example: a limit. Of updates of several
local steps (``_fedavg``) there are clients one after another, all at once, and ours, ``auto``, which chooses. Times are
the best of several rounds in which all take turns. Peaks are of processes of their own; on a GPU the allocator's.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from other_gradients import batched, loop, opacus, vmapped
from torch import nn

from gitlight.architecture import Architecture
from gitlight.config import (
    GradientsConfig,
    LeNetConfig,
    ResNet18Config,
    ResNetConfig,
    SketchConfig,
    TorchvisionResNet50Config,
    UpdatesConfig,
    ViTB16Config,
    ViTConfig,
)
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.precision import full_float32
from gitlight.gradients.sketch import Sketch
from gitlight.gradients.updates import LocalUpdates
from gitlight.leaked import LEAKED_MODELS

METHODS = ("loop", "vmap", "opacus", "compiled", "ours", "batched")
OTHERS = ("loop", "vmap", "opacus")
"""What the ratio compares with."""


@dataclass(frozen=True)
class Case:
    """A leaked model, its image size, leaks at once on CPUs and on a GPU, and what a leak is."""

    settings: Any
    image_size: int
    on_cpus: int
    on_gpu: int
    sketch: SketchConfig | None = None
    client_batch_size: int = 1
    updates: UpdatesConfig | None = None

    def batch_size(self, device: torch.device) -> int:
        """Leaks at once."""
        return self.on_gpu if device.type == "cuda" else self.on_cpus


UPDATES = UpdatesConfig(epochs=1, batch_size=4)
CASES = {
    "lenet": Case(LeNetConfig(), 32, 128, 4096),
    "lenet_512": Case(LeNetConfig(), 32, 512, 16384),
    "resnet20": Case(ResNetConfig(), 32, 64, 1024),
    "resnet18": Case(None, 32, 16, 64),
    "vit": Case(ViTConfig(), 32, 32, 256),
    "vit_b_16": Case(ViTB16Config(), 224, 2, 32),
    "resnet18_cifar": Case(ResNet18Config(), 32, 8, 256),
    "resnet50": Case(TorchvisionResNet50Config(), 224, 2, 32),
    "lenet_n4": Case(LeNetConfig(), 32, 128, 4096, client_batch_size=4),
    "resnet20_n4": Case(ResNetConfig(), 32, 16, 256, client_batch_size=4),
    "lenet_fedavg": Case(LeNetConfig(), 32, 64, 1024, client_batch_size=8, updates=UPDATES),
    "resnet20_fedavg": Case(ResNetConfig(), 32, 4, 64, client_batch_size=32, updates=UpdatesConfig(batch_size=16)),
    "resnet18_fedavg": Case(ResNet18Config(), 32, 4, 32, client_batch_size=8, updates=UPDATES),
    "vit_b_16_sketched": Case(ViTB16Config(), 224, 2, 64, SketchConfig(name="count", size=4096)),
}
LOOPED = 16
"""Leaks of which ``loop`` makes the gradients on a GPU: its rate does not depend on their number."""


def network(name: str) -> nn.Module:
    """A model of the table, frozen in evaluation mode."""
    torch.manual_seed(0)
    case = CASES[name]
    if name == "resnet18":
        from torchvision.models import resnet18

        return resnet18(num_classes=10).eval()
    built = LEAKED_MODELS[case.settings.name].load()(case.settings, (3, case.image_size, case.image_size), 10)
    assert isinstance(built, nn.Module)
    return built.eval()


def ways(name: str, device: torch.device, wanted: tuple[str, ...] = METHODS) -> dict[str, Callable[[], object]]:
    """Each method as a function that makes one batch of gradients."""
    case, model = CASES[name], network(name).to(device)
    shape = (3, case.image_size, case.image_size)
    n_leaks = case.batch_size(device)
    images = torch.rand(n_leaks, case.client_batch_size, *shape, device=device)
    labels = torch.randint(10, images.shape[:2], device=device)
    architecture = Architecture.of(model, shape, 10)
    sketch = None if case.sketch is None else Sketch(architecture, case.sketch)
    looped = looped_leaks(n_leaks, device)
    found: dict[str, Callable[[], object]] = {}
    settings = partial(GradientsConfig, memory_limit_gb=memory_limit_gb(device))
    if case.updates is not None:
        for way, method in (("loop", "loop"), ("vmap", "vmap"), ("ours", "auto")):
            updates = LocalUpdates(model, architecture, settings(method=method, updates=case.updates))
            n = looped if way == "loop" else n_leaks
            found[way] = partial(updates, images[:n], labels[:n], torch.arange(n))
        epochs = case.updates.epochs
        found["batched"] = lambda: [batched(model, images, labels) for _ in range(epochs)]
    else:
        for way, method in (("vmap", "vmap"), ("ours", "captured"), ("compiled", "compiled")):
            engine = GradientEngine(model, architecture, settings(method=method), sketch)
            found[way] = partial(engine, images, labels)
        if sketch is None:
            found["loop"] = lambda: loop(model, images[:looped], labels[:looped])
            found["vmap"] = lambda: vmapped(model, images, labels)  # without what the engine does around it
        found["batched"] = lambda: batched(model, images, labels)
    whole = sketch is None and case.updates is None
    if "opacus" in wanted and whole and (made := opacus(network(name).to(device), images, labels)) is not None:
        found["opacus"] = made
    return {method: found[method] for method in wanted if method in found}


def memory_limit_gb(device: torch.device) -> float:
    """What the engine may use: on a GPU, half of what is free, as others' results are held beside its own."""
    return torch.cuda.mem_get_info(device)[0] / 2e9 if device.type == "cuda" else 64


def looped_leaks(n_leaks: int, device: torch.device) -> int:
    """How many leaks ``loop`` is timed on."""
    return min(n_leaks, LOOPED) if device.type == "cuda" else n_leaks


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def fastest(runs: dict[str, Callable[[], object]], device: torch.device, budget: float) -> dict[str, float]:
    """The best time of each, taken in turns, after one call that is not counted."""
    best = {name: float("inf") for name in runs}
    for run in runs.values():
        seconds(run, device)
    rounds = 0
    end = time.perf_counter() + budget
    while rounds < 3 or (time.perf_counter() < end and rounds < 50):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run, device))
        rounds += 1
    return best


def peak(name: str, method: str, run: Callable[[], object], device: torch.device) -> str:
    """Peak memory above what the model itself takes, in MB; on CPUs of a process of its own."""
    if device.type == "cuda":
        return on_gpu(run, device)
    command = [sys.executable, __file__, "--peak", name, method]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result.stdout.strip().splitlines()[-1] if result.returncode == 0 and result.stdout.strip() else "–"


def on_gpu(run: Callable[[], object], device: torch.device) -> str:
    """Peak of the allocator in MB, less what it holds before."""
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return str(round((torch.cuda.max_memory_allocated(device) - allocated) / 1e6))


def print_peak(name: str, method: str, device: torch.device) -> None:
    """The child process of `peak`."""
    run = ways(name, device, (method,)).get(method)
    if run is None:
        print("–")
        return
    before = _status("VmRSS")
    kept = run()
    print(round(_status("VmHWM") - before), end="\n" if kept is not None else "")


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def limits(device: torch.device) -> tuple[float, float]:
    """Measured bandwidth of a large copy (read and write) in GB/s, and of float32 matrix products in GFLOP/s."""
    source = torch.ones(64_000_000, device=device)
    target = torch.empty_like(source)
    size = 4096 if device.type == "cuda" else 2048
    left, out = torch.randn(size, size, device=device), torch.empty(size, size, device=device)
    with full_float32():
        runs: dict[str, Callable[[], object]] = {
            "copy": lambda: target.copy_(source),
            "product": lambda: torch.mm(left, left, out=out),
        }
        best = fastest(runs, device, 3)
    return 2 * source.numel() * 4 / best["copy"] / 1e9, 2 * size**3 / best["product"] / 1e9


def arithmetic(name: str) -> tuple[float, float]:
    """What one leak needs at least: GFLOP of a forward and backward pass, and GB of its gradient or sketch."""
    from torch.utils.flop_counter import FlopCounterMode

    case = CASES[name]
    model, size, sketched = network(name), case.image_size, case.sketch
    shapes = Architecture.of(model, (3, size, size), 10).parameter_shapes
    if sketched is not None:
        shapes = Sketch(Architecture.of(model, (3, size, size), 10), sketched).shapes
    with FlopCounterMode(display=False) as counter:
        batched(model, torch.rand(1, 1, 3, size, size), torch.zeros(1, 1, dtype=torch.int64))
    passes = case.client_batch_size * (1 if case.updates is None else case.updates.epochs)
    written = sum(torch.Size(shape).numel() for shape in shapes.values())
    return passes * counter.get_total_flops() / 1e9, written * 4 / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(CASES))
    parser.add_argument("--seconds", type=float, default=20, help="measuring time of each model")
    parser.add_argument(
        "--compiled", action="store_true", help="measure gradients.method=compiled, too (slow to start)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.peak:
        print_peak(arguments.peak[0], arguments.peak[1], device)
        return
    bandwidth, products = limits(device)
    print(f"{machine()}; copy {bandwidth:.1f} GB/s, matrix products {products:.0f} GFLOP/s\n")
    methods = tuple(method for method in METHODS if arguments.compiled or method != "compiled")
    columns = ["model, image size, batch", *methods, "ours / (d)", "ours / best of (a), (b), (c)", "limit"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for name in arguments.models:
        case = CASES[name]
        n_leaks = case.batch_size(device)
        runs = ways(name, device, methods)
        best = fastest(runs, device, arguments.seconds)
        made = dict.fromkeys(runs, n_leaks) | {"loop": looped_leaks(n_leaks, device)}
        rates = {method: made[method] / best[method] for method in best}
        cells = []
        for method in methods:
            cell = f"{rates[method]:.4g}" if method in rates else "–"
            if method in rates and not arguments.no_memory:
                cell += f" ({peak(name, method, runs[method], device)} MB)"
            cells.append(cell)
        other = max(rates[method] for method in OTHERS if method in rates)
        del runs
        work, written = arithmetic(name)
        limit = 1 / max(work / products, written / (bandwidth / 2))
        cells += [f"{rates['ours'] / rates['batched']:.2f}", f"{rates['ours'] / other:.2f}", f"{limit:.3g}"]
        print(f"| {name} {case.image_size}, {n_leaks} | " + " | ".join(cells) + " |", flush=True)
    try:
        import opacus as _  # noqa: F401
    except ImportError:
        print("\nOpacus is not installed; its column is empty: pip install 'gitlight[benchmarks]'.")


if __name__ == "__main__":
    main()
