"""Fits and evaluates the exact configs and prints a table: ``python benchmarks/exact.py [NAME ...]``.

Needs the CIFAR-10 sample at ``data/cifar10_subset`` and, for ``vit_b16``, the ImageNet sample at
``data/imagenet_sample`` (image folders). ``hybrid_noise`` and ``descent`` train; the others are closed forms. Seconds
of a fit are those of ``train.py`` as a user waits for it, start of Python included.
"""

import csv
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from generators import DATA
from machine import ROOT, machine

IMAGENET = ["data.name=folder", "data.root=data/imagenet_sample"]


def noise(level: float) -> str:
    """The setting of a channel with white noise."""
    return f"channel=[{{name: gaussian_noise, relative_std: {level}}}]"


class Case(NamedTuple):
    """A fit, and the conditions that private images are attacked under with it.

    ``settings`` are the fit's, ``conditions`` those of each evaluation.
    """

    config: str
    settings: tuple[str, ...]
    n_images: int
    conditions: tuple[tuple[str, ...], ...] = ((),)


CLEAN = ((), ("gradients.dtype=float32",))
NOISY = ((noise(1e-6),), (noise(1e-4),), (noise(1e-2),))
TANH = ("leaked.activation=tanh", "leaked.init=default")

CASES = {
    "sigmoid": Case("lenet_exact", (), 100, CLEAN),
    "sigmoid_noise": Case("lenet_exact", (), 100, NOISY),
    "sigmoid_float32_pairs": Case("lenet_exact", ("gradients.dtype=float32",), 20),
    "sigmoid_noisy_pairs": Case("lenet_exact", (noise(1e-6),), 20),
    # Takes its weights from the run of `sigmoid`.
    "hybrid_exact_noise": Case("lenet_hybrid_exact", ("generator.weights_from=runs/benchmarks/exact_sigmoid",), 100),
    "hybrid_noise": Case("lenet_hybrid", (noise(1e-2),), 100),
    "descent": Case("lenet_exact_descent", (), 20),
    "leaky_relu": Case("lenet_exact", ("leaked.activation=leaky_relu",), 100, CLEAN),
    "leaky_relu_noise": Case("lenet_exact", ("leaked.activation=leaky_relu",), 50, NOISY),
    "tanh": Case("lenet_exact", TANH, 100, CLEAN),
    "tanh_noise": Case("lenet_exact", TANH, 50, NOISY),
    "tanh_saturated": Case("lenet_exact", ("leaked.activation=tanh",), 20, CLEAN),
    "relu": Case("lenet_exact", ("leaked.activation=relu",), 50),
    "relu_default": Case("lenet_exact", ("leaked.activation=relu", "leaked.init=default"), 20),
    "mlp": Case("mlp_exact", (), 100),
    "resnet20": Case("resnet20_exact", (), 1000),
    "vit_b16": Case("vit_b16_exact", (), 20),
}


def measure(name: str) -> list[str]:
    """The rows of one case."""
    case = CASES[name]
    run = ROOT / "runs" / "benchmarks" / f"exact_{name}"
    data = IMAGENET if name == "vit_b16" else DATA
    settings = [*data, *case.settings, f"output_dir={run}", "logging.quiet=true", "logging.wandb=off"]
    started = time.perf_counter()
    _run("train.py", f"configs/{case.config}.yaml", *settings)
    seconds = time.perf_counter() - started
    rows = []
    for condition in case.conditions:
        shown = [f"evaluation.n_images={case.n_images}", *condition]
        _run("evaluate.py", str(run), *shown)
        results = json.loads((run / "evaluation" / "metrics.json").read_text())["results"]
        found = results[-1]
        psnr = found["metrics"]["psnr"]
        counts: Counter[str] = Counter()
        for words, count in found.get("verdicts", {}).items():
            counts[words.split(":")[0]] += count
        verdicts = "; ".join(f"{count} {words}" for words, count in counts.items())
        cells = [
            name,
            " ".join(condition) or "none",
            f"{seconds:.0f}",
            _largest_distance(run),
            f"{psnr['mean']:.2f} [{psnr['ci95'][0]:.2f}, {psnr['ci95'][1]:.2f}]",
            f"{found['seconds_per_image']:.2f}",
            str(found["n_images"]),
            verdicts or "–",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _run(*command: str) -> None:
    """A command as a user gives it; its output goes to the standard error, and the table alone to the output."""
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=sys.stderr)


def _largest_distance(run: Path) -> str:
    """The largest relative distance of a fitted weight to the leaked one."""
    with (run / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    latest: dict[str, float] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith("weight_distance/") and key.endswith("_relative") and "total" not in key and value:
                latest[key] = float(value)
    return f"{max(latest.values()):.1e}" if latest else "none fitted"


def main() -> None:
    """Measure the cases named on the command line, or all."""
    print(f"\n{machine()}\n")
    columns = ["case", "changed for the attack", "fit, s", "largest weight distance", "PSNR, dB", "s per image"]
    columns += ["images", "verdicts"]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns), flush=True)
    for name in sys.argv[1:] or CASES:
        for row in measure(name):
            print(row, flush=True)


if __name__ == "__main__":
    main()
