"""What figures were measured with: the line above every table of a benchmark."""

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def machine(seeds: Sequence[int] = (0,)) -> str:
    """Date, commit, processor, cores, GPU, versions, seeds."""
    date = datetime.datetime.now(tz=datetime.UTC).date()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    parts = [date, commit(), processor(), f"{os.cpu_count()} cores", gpu, f"torch {torch.__version__}"]
    parts.append(f"seed {', '.join(map(str, seeds))}")
    return ", ".join(map(str, parts))


def commit() -> str:
    """Of the working tree, with ``-dirty`` where files have changed; a copy without its history has none."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "a copy without git"


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
