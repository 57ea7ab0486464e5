"""Training speed on one process and on several: ``python benchmarks/training.py [NAME ...]``.

Runs ``train.py`` on each of `CASES` with 1 process and with 2 on CPUs, a thread each, or on 1 to 8 GPUs where there are
so many; the global batch is the same each time (on GPUs a larger one, in bf16). Pairs per second are those that
`gitlight.callbacks.throughput` logs. Efficiency is pairs per second over those of one process, over the number of
processes. Needs the CIFAR-10 sample at ``data/cifar10_subset``.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from generators import DATA
from machine import ROOT, machine

CASES = {
    "lenet_hybrid": ("lenet_hybrid", ()),
    "lenet_mlp": ("lenet_mlp", ()),
    # What a step costs whatever its batch, sums over processes above all, is shared by four times as many pairs.
    "lenet_mlp_512": ("lenet_mlp", ("data.batch_size=512",)),
    "resnet20_coarse": ("resnet20_coarse", ()),
}
"""Name → config, and what is changed in it."""
STEPS, WARM_UP = 60, 20
"""Steps of each run, and those of them that are left out: fits, first touches, caches."""

ON_GPUS = ("data.n_public_images=10000", "data.batch_size=1024", "trainer.precision=bf16-mixed")
"""Settings of runs there, where a batch for two CPU cores leaves a device idle."""


def counts() -> list[int]:
    """Numbers of processes to compare."""
    gpus = torch.cuda.device_count()
    return [n for n in (1, 2, 4, 8) if n <= gpus] if gpus else [1, 2]


def measured(name: str, n: int, folder: Path) -> tuple[float, float, float]:
    """Pairs per second, steps per second, and the share of time that making pairs takes."""
    config, changed = CASES[name]
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        str(ROOT / "configs" / f"{config}.yaml"),
        *DATA,
        "logging.wandb=off",
        "logging.quiet=true",
        f"trainer.devices={n}",
        f"trainer.max_steps={STEPS}",
        "trainer.max_epochs=1000",
        "data.n_public_images=2000",
        "trainer.check_val_every_n_epoch=1000",
        "trainer.limit_val_batches=1",
        "trainer.log_every_n_steps=10",
        f"output_dir={folder / f'{name}_{n}'}",
        *(ON_GPUS if torch.cuda.is_available() else ()),
        *changed,
    ]
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, check=True, stdout=subprocess.DEVNULL)
    with (folder / f"{name}_{n}" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("throughput/pairs_per_second")]
    late = [row for row in rows if int(row["step"]) >= WARM_UP]
    pairs = statistics.median(float(row["throughput/pairs_per_second"]) for row in late)
    making = statistics.median(float(row["throughput/share_making_pairs"]) for row in late)
    with (folder / f"{name}_{n}" / "config.yaml").open() as file:
        batch = next(int(line.split(":")[1]) for line in file if line.strip().startswith("batch_size:"))
    return pairs, pairs / batch, making


def main() -> None:
    """The cases named on the command line, or all."""
    names = sys.argv[1:] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"no case of the name {unknown[0]}; there are {', '.join(CASES)}")
    print(f"\n{machine()}\n")
    print("| case | processes | pairs/s | steps/s | share making pairs | efficiency |")
    print("|" + " --- |" * 6)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            alone = None
            for n in counts():
                pairs, steps, making = measured(name, n, Path(folder))
                alone = alone or pairs
                cells = [name, n, f"{pairs:.0f}", f"{steps:.2f}", f"{making:.0%}", f"{pairs / alone / n:.2f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
