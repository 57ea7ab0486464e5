"""Real runs of the two commands: as processes where processes matter, else in this one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gitlight.cli import evaluate_command, train_command

ROOT = Path(__file__).parent.parent.parent


class Command:
    """Runs ``train.py`` or ``evaluate.py`` from a folder that is not the repository."""

    def __init__(self, folder):
        self.folder = folder
        # One thread a process: the order of float32 sums then does not depend on how busy the machine is.
        without_wandb = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        self.environment = {**without_wandb, "OMP_NUM_THREADS": "1"}

    def start(self, script, *arguments):
        command = [sys.executable, str(ROOT / script), *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def __call__(self, script, *arguments, code=0):
        process = self.start(script, *arguments)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == code, output
        return output

    def wait_for(self, process, condition):
        """Wait until the condition holds, which it must before the process ends."""
        deadline = time.monotonic() + 200
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.005)

    def child_of(self, process):
        """The id of the process that this one has started."""
        listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
        (child,) = (line.split()[0] for line in listed.stdout.splitlines() if "train.py" in line)
        return int(child)

    def kill_when(self, process, condition):
        """SIGKILL the process as soon as the condition holds."""
        self.wait_for(process, condition)
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture
def command(tmp_path):
    return Command(tmp_path)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``train.py`` in this process, from a folder of its own; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *arguments: train_command(list(arguments), ROOT / "configs" / "demo.yaml")
    torch.set_num_threads(threads)


@pytest.fixture
def ctrl_c():
    """As at a terminal; tests may run in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.SIGINT
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def evaluate():
    """``evaluate.py`` in this process; gives the exit code."""
    return lambda *arguments: evaluate_command(list(arguments))
