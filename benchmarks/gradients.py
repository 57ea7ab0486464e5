"""Pairs per second and peak memory of each way to make gradients: ``python benchmarks/gradients.py [MODEL ...]``.

Columns: (a) a loop of backward passes of one image, the way of the published LTI code; (b) ``torch.func.vmap(grad)``;
(c) Opacus' ``GradSampleModule``, where the extra ``benchmarks`` is installed; ours, ``gradients.method=captured``; and
(d) one ordinary backward pass of the whole batch, which makes no gradients per example: a limit. Times are the best of
several rounds in which all take turns. Peaks are of processes of their own.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gitlight.architecture import Architecture
from gitlight.config import GradientsConfig, LeNetConfig, ResNetConfig, ViTB16Config, ViTConfig
from gitlight.gradients.engine import GradientEngine
from gitlight.gradients.precision import full_float32
from gitlight.leaked import LEAKED_MODELS

ROOT = Path(__file__).parent.parent
METHODS = ("loop", "vmap", "opacus", "compiled", "captured", "batched")
OTHERS = ("loop", "vmap", "opacus")
"""What the ratio compares with."""


@dataclass(frozen=True)
class Case:
    """A leaked model, its image size, and leaks at once."""

    settings: Any
    image_size: int
    batch_size: int


CASES = {
    "lenet": Case(LeNetConfig(), 32, 128),
    "lenet_512": Case(LeNetConfig(), 32, 512),
    "resnet20": Case(ResNetConfig(), 32, 64),
    "resnet18": Case(None, 32, 16),
    "vit": Case(ViTConfig(), 32, 32),
    "vit_b_16": Case(ViTB16Config(), 224, 2),
}


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
    images = torch.rand(case.batch_size, 1, *shape, device=device)
    labels = torch.randint(10, (case.batch_size, 1), device=device)
    architecture = Architecture.of(model, shape, 10)
    found: dict[str, Callable[[], object]] = {}
    for method in ("vmap", "captured", "compiled"):
        engine = GradientEngine(model, architecture, GradientsConfig(method=method, memory_limit_gb=64))
        found[method] = partial(engine, images, labels)
    found["loop"] = lambda: loop(model, images, labels)
    found["batched"] = lambda: batched(model, images, labels)
    if "opacus" in wanted and (made := opacus(network(name).to(device), images, labels)) is not None:
        found["opacus"] = made
    return {method: found[method] for method in wanted if method in found}


def loop(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """One backward pass per leak, copied into place."""
    parameters = list(model.parameters())
    with full_float32():
        results = [torch.empty(len(images), *p.shape, device=p.device) for p in parameters]
        for leak in range(len(images)):
            found = torch.autograd.grad(F.cross_entropy(model(images[leak]), labels[leak]), parameters)
            for result, gradient in zip(results, found, strict=True):
                result[leak] = gradient
    return results


def batched(model: nn.Module, images: Tensor, labels: Tensor) -> object:
    """The ordinary gradient of the summed loss."""
    with full_float32():
        loss = F.cross_entropy(model(images[:, 0]), labels[:, 0], reduction="sum")
        return torch.autograd.grad(loss, list(model.parameters()))


def opacus(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object] | None:
    """Opacus' way; None where it is missing or does not support the model."""
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError:
        return None
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return None  # it has no per-example gradients of batch norm
    for module in model.train().modules():  # its hooks sleep in evaluation mode; there is no dropout
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    try:
        wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    except (NotImplementedError, ValueError):
        return None

    def run() -> object:
        with full_float32():
            wrapped.zero_grad()
            F.cross_entropy(wrapped(images[:, 0]), labels[:, 0], reduction="sum").backward()
        return [p.grad_sample for p in wrapped.parameters()]

    try:
        run()
    except Exception as error:  # Opacus' own errors for layers that it cannot handle are of many kinds
        print(f"Opacus does not run this model: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return run


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
        run()
    rounds = 0
    end = time.perf_counter() + budget
    while rounds < 3 or (time.perf_counter() < end and rounds < 50):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run, device))
        rounds += 1
    return best


def peak(name: str, method: str) -> str:
    """Peak memory above what the model itself takes, in MB, of a process of its own."""
    command = [sys.executable, __file__, "--peak", name, method]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result.stdout.strip().splitlines()[-1] if result.returncode == 0 and result.stdout.strip() else "–"


def print_peak(name: str, method: str, device: torch.device) -> None:
    """The child process of `peak`."""
    run = ways(name, device, (method,)).get(method)
    if run is None:
        print("–")
        return
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        print(round((torch.cuda.max_memory_allocated(device) - allocated) / 1e6))
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
    """What one leak needs at least: GFLOP of forward and backward pass, and GB of its gradient written once."""
    from torch.utils.flop_counter import FlopCounterMode

    model, size = network(name), CASES[name].image_size
    with FlopCounterMode(display=False) as counter:
        batched(model, torch.rand(1, 1, 3, size, size), torch.zeros(1, 1, dtype=torch.int64))
    return counter.get_total_flops() / 1e9, sum(p.numel() for p in model.parameters()) * 4 / 1e9


def machine(device: torch.device) -> str:
    """Date, commit, processor, cores, versions."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    date = datetime.datetime.now(tz=datetime.UTC).date()
    return f"{date}, commit {commit}, {model}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__}, seed 0"


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
    print(f"{machine(device)}; copy {bandwidth:.1f} GB/s, matrix products {products:.0f} GFLOP/s\n")
    methods = tuple(method for method in METHODS if arguments.compiled or method != "compiled")
    columns = ["model, image size, batch", *methods, "ours / (d)", "ours / best of (a), (b), (c)", "limit"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for name in arguments.models:
        case = CASES[name]
        best = fastest(ways(name, device, methods), device, arguments.seconds)
        rates = {method: case.batch_size / best[method] for method in best}
        cells = []
        for method in methods:
            cell = f"{rates[method]:.4g}" if method in rates else "–"
            cells.append(cell if arguments.no_memory else f"{cell} ({peak(name, method)} MB)")
        other = max(rates[method] for method in OTHERS if method in rates)
        work, written = arithmetic(name)
        limit = 1 / max(work / products, written / (bandwidth / 2))
        cells += [f"{rates['captured'] / rates['batched']:.2f}", f"{rates['captured'] / other:.2f}", f"{limit:.3g}"]
        print(f"| {name} {case.image_size}, {case.batch_size} | " + " | ".join(cells) + " |", flush=True)
    try:
        import opacus as _  # noqa: F401
    except ImportError:
        print("\nOpacus is not installed; its column is empty: pip install 'gitlight[benchmarks]'.")


if __name__ == "__main__":
    main()
