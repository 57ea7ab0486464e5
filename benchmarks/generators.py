"""Trains and evaluates generators and prints a table: ``python benchmarks/generators.py [NAME ...]``.

Needs the CIFAR-10 sample at ``data/cifar10_subset`` (10,000 training and 2,000 test images as an image folder).
Seconds are those of ``train.py`` as a user waits for it, start of Python, closed-form fits and validation included.
"""

import json
import subprocess
import sys
import time
from typing import NamedTuple

from machine import ROOT, machine

from gitlight import load_config
from gitlight.generators.width import n_trainable
from gitlight.training import build_generator, build_pairs

DATA = ["data.name=folder", "data.root=data/cifar10_subset", "data.download=false"]


class Case(NamedTuple):
    """A config, and what is changed in it."""

    config: str
    settings: tuple[str, ...] = ()


CASES = {
    "lenet_mlp": Case("lenet_mlp"),
    "lenet_coarse": Case("lenet_coarse"),
    "lenet_hybrid": Case("lenet_hybrid"),
    # LTI as published (Wu et al. 2023): 81 million parameters, raw gradients. An hour and more on two cores.
    "lenet_lti": Case(
        "lenet_mlp",
        (
            *("generator.hidden_size=3000", "generator.scale_inputs=false", "optimizer.learning_rate=1e-4"),
            *("optimizer.schedule=step", "optimizer.warmup_fraction=0", "data.batch_size=256"),
            *("data.horizontal_flip=false", "trainer.max_epochs=200"),
        ),
    ),
    "resnet20_mlp": Case("resnet20_mlp"),
    "resnet20_coarse": Case("resnet20_coarse"),
    "resnet20_hybrid": Case("resnet20_hybrid"),
    # What each part is worth.
    "lenet_coarse_no_averages": Case("lenet_coarse", ("generator.averages=false",)),
    "lenet_coarse_one_module": Case("lenet_coarse", ("generator.modules=['*']",)),
    "resnet20_coarse_no_averages": Case("resnet20_coarse", ("generator.averages=false",)),
    "resnet20_hybrid_no_averages": Case("resnet20_hybrid", ("generator.averages=false",)),
}
"""Name → what is trained. Without names on the command line all but ``lenet_lti`` are."""


def measure(name: str) -> str:
    """One row of the table."""
    case = CASES[name]
    run = ROOT / "runs" / "benchmarks" / name
    settings = [*DATA, *case.settings, f"output_dir={run}", "logging.quiet=true", "logging.wandb=off"]
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "train.py", f"configs/{case.config}.yaml", *settings], cwd=ROOT, check=True, stdout=sys.stderr
    )
    seconds = time.perf_counter() - started
    subprocess.run([sys.executable, "evaluate.py", str(run)], cwd=ROOT, check=True, stdout=sys.stderr)
    result = json.loads((run / "evaluation" / "metrics.json").read_text())["results"][0]
    config = load_config(run)
    parameters = n_trainable(build_generator(config, build_pairs(config).architecture))
    cells = [name, f"{parameters / 1e6:.1f}", f"{seconds:.0f}", f"{1000 * result['seconds_per_image']:.1f}"]
    for metric, digits in (("psnr", 2), ("ssim", 4), ("mse", 5)):
        found = result["metrics"][metric]
        low, high = found["ci95"]
        cells.append(f"{found['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    cells += [f"{100 * result['label_accuracy']:.1f} %", str(result["n_images"])]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure the cases named on the command line, or all but the longest."""
    print(f"\n{machine()}\n")
    columns = ["case", "million parameters", "training, s", "ms per image", "PSNR, dB", "SSIM", "MSE", "labels right"]
    print("| " + " | ".join([*columns, "images"]) + " |")
    print("|" + " --- |" * (len(columns) + 1), flush=True)
    for name in sys.argv[1:] or [name for name in CASES if name != "lenet_lti"]:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main()
