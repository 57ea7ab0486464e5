"""Kills a run at random moments, resumes it each time, and compares its end with the same run's, never interrupted.

    python benchmarks/kills.py                    20 kills
    python benchmarks/kills.py --kills 5 --seed 3

Weights and every logged number but the throughput must be equal, bit for bit; exit code 1 if they are not. Runs on the
CPU with one thread a process.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gitlight.errors import CheckpointError
from gitlight.runs import checkpoint_path, load_checkpoint

ROOT = Path(__file__).parents[1]
EVERY = 7
"""Optimiser steps between checkpoints; an epoch has 21."""
CONFIG = f"""\
generator: {{name: hybrid, channels: 8, blocks: 1}}
data: {{n_public_images: 336, n_validation: 16, batch_size: 16, horizontal_flip: true}}
leaked: {{width: 4}}
channel: [{{name: gaussian_noise, relative_std: 0.001}}]
trainer: {{accelerator: cpu, max_epochs: 10, log_every_n_steps: 1, checkpoint_every_n_steps: {EVERY}}}
logging: {{quiet: true, wandb: "off"}}
"""


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.yaml").write_text(CONFIG)
        whole, killed = folder / "whole", folder / "killed"
        process, began = start(folder, whole), time.monotonic()
        while process.poll() is None and not steps_logged(whole):
            time.sleep(0.01)
        starting = time.monotonic() - began
        check(process)
        training = time.monotonic() - began - starting
        print(
            f"uninterrupted: {steps_logged(whole)} steps, {starting:.1f} s to the first, {training:.1f} s of training"
        )
        print(f"{'kill':>4} {'while':>9} {'after s':>8} {'checkpoint':>10} {'logged':>6} {'lost':>4}")
        n_kills = restarts = most_lost = 0
        while n_kills < options.kills:
            # Every fifth while it starts, and the others after its first step.
            in_training = n_kills % 5 != 4
            moment = draw.uniform(0, 2 * training / options.kills if in_training else starting)
            before = modified(killed)
            process = start(folder, killed)
            while in_training and process.poll() is None and modified(killed) == before:
                time.sleep(0.01)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
            else:
                check(process)
                print(f"the run ended before kill {n_kills + 1}; it begins again")
                shutil.rmtree(killed)
                restarts += 1
                continue
            n_kills += 1
            kept, logged = step_of(killed), steps_logged(killed)
            most_lost = max(most_lost, lost := logged - kept)
            when = "training" if in_training else "starting"
            print(f"{n_kills:4d} {when:>9} {moment:8.2f} {kept:10d} {logged:6d} {lost:4d}", flush=True)
        check(start(folder, killed))
        equal = same(whole, killed)
    print(
        f"{n_kills} kills, {restarts} runs that ended before; most steps lost: {most_lost} (checkpoint every {EVERY})"
    )
    print(f"metrics and weights {'equal' if equal else 'DIFFER from'} the uninterrupted run's, bit for bit")
    return 0 if equal and most_lost <= EVERY else 1


def start(folder: Path, run: Path) -> subprocess.Popen[str]:
    """``train.py``, continuing where the run is."""
    command = [sys.executable, str(ROOT / "train.py"), "run.yaml", f"output_dir={run}", "trainer.resume=auto"]
    # The order of float32 sums must not depend on how busy the machine is.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def check(process: subprocess.Popen[str]) -> None:
    """Wait for a run to its end; leave with its message if it fails."""
    _, message = process.communicate()
    if process.returncode:
        sys.exit(f"train.py ended with exit code {process.returncode}: {message}")


def rows(run: Path) -> list[dict[str, str]]:
    """What the run logged, without what depends on the clock."""
    if not (run / "metrics.csv").is_file():
        return []
    text = (run / "metrics.csv").read_text()
    complete = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    timeless = [{key: value for key, value in row.items() if not key.startswith("throughput")} for row in complete]
    return [row for row in timeless if any(value for key, value in row.items() if key not in ("epoch", "step"))]


def steps_logged(run: Path) -> int:
    """How many optimiser steps the run has logged the loss of."""
    return max((int(row["step"]) + 1 for row in rows(run) if row.get("train/loss")), default=0)


def modified(run: Path) -> int:
    """When the log was last written to; it is at the first step of every process."""
    path = run / "metrics.csv"
    return path.stat().st_mtime_ns if path.is_file() else 0


def step_of(run: Path) -> int:
    """The step that the run's last checkpoint is of; 0 without one. A damaged one ends the benchmark."""
    path = checkpoint_path(run, "last")
    if not path.is_file():
        return 0
    try:
        return int(load_checkpoint(path)["global_step"])
    except CheckpointError as error:
        sys.exit(f"a kill damaged a checkpoint: {error}")


def same(one: Path, other: Path) -> bool:
    """Whether logged numbers and last weights are equal."""
    first, second = (load_checkpoint(checkpoint_path(run, "last"))["state_dict"] for run in (one, other))
    weights = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return weights and rows(one) == rows(other)


if __name__ == "__main__":
    sys.exit(main())
