"""The same sweep files under W&B's own agent: its code, without its server."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
import wandb.wandb_agent
import yaml
from sweep_files import ROOT, write_sweep
from wandb.sdk.launch.sweeps.utils import load_sweep_config

from gitlight.config import Config
from gitlight.config_loading import load_config
from gitlight.loggers import build_loggers
from gitlight.sweep.specification import load_specification

VALUES: dict[str, Any] = {
    "optimizer.learning_rate": 1e-05,
    "generator.channels": 32,
    "generator.averages": False,
    "optimizer.schedule": "step",
}


class Started:
    """Stands in for the agent's process, and keeps what it would have run."""

    last: "Started"

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        self.command, self.env = command, env
        Started.last = self


@pytest.fixture
def agent_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What the agent runs for a sweep file and arguments that its server sends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb.wandb_agent, "AgentProcess", Started)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path) if name == "WANDB_DIR" else "")

    def run(file: Path, arguments: dict[str, Any]) -> Started:
        content = load_sweep_config(str(file))
        assert content is not None
        agent = wandb.wandb_agent.Agent(api=None, queue=None)
        agent._sweep_command = content["command"]
        sent = {name: {"value": value} for name, value in arguments.items()}
        agent._command_run({"type": "run", "run_id": "run1", "program": content["program"], "args": sent})
        return Started.last

    return run


@pytest.mark.parametrize("name", ["lenet_hybrid", "lenet_coarse_grid", "lenet_mlp_random"])
def test_the_agent_makes_the_same_command(agent_command: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = ROOT / "configs" / "sweeps" / f"{name}.yaml"
    theirs = agent_command(file, VALUES).command
    monkeypatch.chdir(ROOT)
    ours = load_specification(file).expand_command(VALUES)
    assert theirs[:2] == ["/usr/bin/env", "python"]
    assert ours == [theirs[0], sys.executable, *theirs[2:]]
    assert theirs[-len(VALUES) :] == [f"{name}={value}" for name, value in VALUES.items()]


def test_nested_parameters_make_the_same_settings(agent_command: Any, tmp_path: Path) -> None:
    nested = "{optimizer: {parameters: {learning_rate: {value: 0.5}, name: {value: sgd}}}, seed: {value: 3}}"
    file = write_sweep(tmp_path, parameters=nested)
    # W&B hands a nested parameter over as one mapping.
    theirs = agent_command(file, {"optimizer": {"learning_rate": 0.5, "name": "sgd"}, "seed": 3}).command
    ours = load_specification(file).expand_command({"optimizer.learning_rate": 0.5, "optimizer.name": "sgd", "seed": 3})
    theirs, ours = (load_config(command[3], [*command[4:], "output_dir=x"]) for command in (theirs, ours))
    assert theirs == ours
    assert ours.optimizer.learning_rate == 0.5


def test_a_run_of_the_agent_has_the_agents_folder_and_id(agent_command: Any, tmp_path: Path) -> None:
    started = agent_command(write_sweep(tmp_path), {"generator.channels": 32})
    code = (
        "import sys, wandb\n"
        "from pathlib import Path\n"
        "from gitlight.config_loading import load_config\n"
        "from gitlight.loggers import build_loggers\n"
        "config = load_config(sys.argv[1], sys.argv[2:])\n"
        "_, logger = build_loggers(config, Path(config.output_dir), 'shown', None)\n"
        "logger.log_metrics({'val/psnr': 20.0})\n"
        "run = logger.experiment\n"
        "print('FOUND', config.output_dir, run.id, run.config['generator.channels'])\n"
        "logger.finalize('success')\n"
    )
    # Another interpreter: wandb reads the environment once a process.
    found = subprocess.run(
        [sys.executable, "-c", code, *started.command[3:], "logging.quiet=false"],
        env={**started.env, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path("runs") / "sweeps" / "sweep1" / "run1"
    assert f"FOUND {folder} run1 32" in found.stdout
    assert "Ignoring" not in found.stdout + found.stderr


def test_an_output_dir_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "r")
    demo = ROOT / "configs" / "demo.yaml"
    assert load_config(demo, ["output_dir=elsewhere"]).output_dir == "elsewhere"
    assert load_config(demo).output_dir == str(Path("runs") / "sweeps" / "s" / "r")
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert load_config(demo).output_dir == str(Path("runs") / "demo")


def test_a_run_id_without_a_sweep_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    _, logger = build_loggers(Config(), tmp_path, "name", None)
    assert logger.version != "mine"


def test_files_are_read_as_wandb_reads_them() -> None:
    for file in (ROOT / "configs" / "sweeps").glob("*.yaml"):
        assert load_sweep_config(str(file)) == yaml.safe_load(file.read_text())
