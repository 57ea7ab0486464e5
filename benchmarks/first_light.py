"""Trains and evaluates the LeNet configs and prints a table: ``python benchmarks/first_light.py [NAME ...]``.

Needs the CIFAR-10 sample at ``data/cifar10_subset`` (10,000 training and 2,000 test images as an image folder).
Seconds are those of ``train.py`` as a user waits for it, start of Python, closed-form fits and validation included.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ["data.name=folder", "data.root=data/cifar10_subset", "data.download=false"]
NAMES = ["lenet_mlp", "lenet_coarse", "lenet_hybrid"]


def measure(name: str) -> str:
    """One row of the table."""
    run = ROOT / "runs" / "benchmarks" / name
    started = time.perf_counter()
    train = ["train.py", f"configs/{name}.yaml", *DATA, f"output_dir={run}", "logging.quiet=true", "logging.wandb=off"]
    subprocess.run([sys.executable, *train], cwd=ROOT, check=True)
    seconds = time.perf_counter() - started
    subprocess.run([sys.executable, "evaluate.py", str(run)], cwd=ROOT, check=True)
    result = json.loads((run / "evaluation" / "metrics.json").read_text())["results"][0]
    cells = [name, f"{seconds:.0f}"]
    for metric, digits in (("psnr", 2), ("ssim", 4), ("mse", 5)):
        found = result["metrics"][metric]
        low, high = found["ci95"]
        cells.append(f"{found['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    cells += [f"{100 * result['label_accuracy']:.1f} %", str(result["n_images"])]
    return "| " + " | ".join(cells) + " |"


def machine() -> str:
    """Date, commit, processor, cores, versions."""
    import torch

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    devices = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    date = datetime.datetime.now(tz=datetime.UTC).date()
    return f"{date}, commit {commit}, {model}, {os.cpu_count()} cores, {devices}, torch {torch.__version__}, seed 0"


def main() -> None:
    """Measure the configs named on the command line, or all."""
    rows = [measure(name) for name in sys.argv[1:] or NAMES]
    print(f"\n{machine()}\n")
    print("| config | training, s | PSNR, dB | SSIM | MSE | labels right | images |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
