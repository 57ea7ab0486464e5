"""Fully sharded training with two processes: the same curves, whole checkpoints, half of everything on each."""

import csv
import json
import os
import subprocess
import sys

import pytest
from small_run import SMALL

FSDP = ["trainer.devices=2", "trainer.strategy=fsdp"]

# The ranks' shares of what is validated on differ, even in their number of batches: 9 and 8 leaks in batches of 8.
UNEVEN = ["data.n_validation=17", "trainer.max_epochs=2"]

HALVES = """
import json, sys
from pathlib import Path
from lightning import Trainer
from gitlight import load_config
from gitlight.sharding import FullyShardedStrategy
from gitlight.training import GITModule, build_generator, build_pairs

config = load_config("run.yaml", sys.argv[1:])
pairs = build_pairs(config)
module = GITModule(build_generator(config, pairs.architecture), config.optimizer)
whole = sum(parameter.numel() for parameter in module.parameters())
trainer = Trainer(
    strategy=FullyShardedStrategy(), accelerator="cpu", devices=2, max_steps=2, logger=False, inference_mode=False,
    num_sanity_val_steps=0, use_distributed_sampler=False, enable_progress_bar=False, enable_checkpointing=False,
)
trainer.fit(module, datamodule=pairs)
own = sum(parameter.to_local().numel() for parameter in module.parameters())
states = trainer.optimizers[0].state.values()
averages = [sum(state[name].to_local().numel() for state in states) for name in ("exp_avg", "exp_avg_sq")]
found = {"whole": whole, "own": own, "averages": averages}
Path(f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
"""


OWN_LAYERS = """
import torch
from torch import nn

class Attentive(nn.Module):
    \"\"\"Large layers that are not called themselves: attention's projection, and one whose weight two use.\"\"\"

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 1024, 8, 8)
        self.attention = nn.MultiheadAttention(1024, 2, batch_first=True)
        self.once, self.again = nn.Linear(1024, 1024), nn.Linear(1024, 1024)
        self.again.weight = self.once.weight
        self.head = nn.Linear(1024, 8)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = nn.functional.linear(torch.relu(self.once(x)), self.again.weight, self.again.bias)
        return self.head(x.mean(1))
"""


def assert_alike(run, other):
    found, wanted = rows(run), rows(other)
    assert len(found) == len(wanted)
    for its, others in zip(found, wanted, strict=True):
        assert its == pytest.approx(others, rel=1e-4)


def rows(run):
    with (run / "metrics.csv").open() as file:
        found = [
            {key: float(value) for key, value in row.items() if value and not key.startswith("throughput")}
            for row in csv.DictReader(file)
        ]
    return [row for row in found if len(row) > 2]  # with more than epoch and step


@pytest.mark.parametrize(
    "settings",
    [
        ["generator.name=mlp", "generator.hidden_size=512"],  # two layers of more than 2²⁰ entries: units of their own
        pytest.param(  # with a loss of the generator's own
            [
                *("generator.name=hybrid", "generator.channels=8", "data.n_public_images=512", "data.batch_size=64"),
                "channel=[{name: gaussian_noise, relative_std: 0.1, lowest_std: 0.001}]",
                *("trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mlp", "hybrid"],
)
def test_generators_follow_the_curve_of_one_process(command, train, tmp_path, settings):
    (tmp_path / "run.yaml").write_text("data: {horizontal_flip: true}\n")
    settings = ["run.yaml", *SMALL, *UNEVEN, *settings]
    assert train(*settings, "trainer.devices=1", f"output_dir={tmp_path / 'one'}") == 0
    command("train.py", *settings, *FSDP, f"output_dir={tmp_path / 'two'}")
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    "settings",
    ["task: leaked\nleaked: {name: resnet20}\n", "task: image_prior\nimage_prior: {channels: 16}\n"],
    ids=["leaked", "image_prior"],
)
@pytest.mark.slow
def test_other_tasks_follow_the_curve_of_two_processes(command, tmp_path, settings):
    """Batch norms average over what each process has of a batch, and each draws latents of its own."""
    (tmp_path / "run.yaml").write_text(settings)
    for strategy in ("ddp", "fsdp"):
        own = ["trainer.devices=2", f"trainer.strategy={strategy}", f"output_dir={tmp_path / strategy}"]
        # Training a network of four channels, PyTorch 2.15's oneDNN corrupts memory on some processors.
        command("train.py", "run.yaml", *SMALL, *UNEVEN, "leaked.width=8", *own)
    assert_alike(tmp_path / "fsdp", tmp_path / "ddp")


@pytest.mark.slow
def test_large_layers_of_own_models_need_not_be_called_themselves(command, tmp_path):
    (tmp_path / "own_layers.py").write_text(OWN_LAYERS)
    command.environment["PYTHONPATH"] = str(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "task: leaked\nleaked: {name: custom, target: own_layers.Attentive}\noptimizer: {learning_rate: 1.0e-4}\n"
    )
    shared = [setting for setting in SMALL if not setting.startswith("leaked.")]
    settings = [*shared, "data.batch_size=8", "trainer.limit_train_batches=2", "trainer.max_epochs=1"]
    for strategy in ("ddp", "fsdp"):
        own = ["trainer.devices=2", f"trainer.strategy={strategy}", f"output_dir={tmp_path / strategy}"]
        command("train.py", "run.yaml", *settings, *own)
    assert_alike(tmp_path / "fsdp", tmp_path / "ddp")


ODD = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self, scalar):
        super().__init__()
        self.head, self.unused = nn.Linear(3072, 8), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(() if scalar else 1))

    def forward(self, images):
        return self.head(images.flatten(1)) * self.scale
"""


@pytest.mark.slow
@pytest.mark.parametrize(("scalar", "named"), [("true", "scale"), ("false", "unused.weight")])
def test_parameters_that_cannot_be_sharded_or_resumed_are_named(command, tmp_path, scalar, named):
    (tmp_path / "odd.py").write_text(ODD)
    command.environment["PYTHONPATH"] = str(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"task: leaked\nleaked: {{name: custom, target: odd.Odd, arguments: {{scalar: {scalar}}}}}\n"
    )
    shared = [setting for setting in SMALL if not setting.startswith("leaked.")]
    output = command("train.py", "run.yaml", *shared, *FSDP, "trainer.max_epochs=1", code=2)
    assert "error: trainer.strategy: fsdp" in output
    assert named in output


@pytest.mark.slow
def test_sgd_goes_on_as_if_it_had_not_stopped(command, tmp_path):
    (tmp_path / "run.yaml").write_text("generator: {name: mlp, hidden_size: 16}\n")
    settings = [*SMALL, "optimizer.name=sgd", "optimizer.learning_rate=0.1", "optimizer.schedule=constant", *FSDP]
    command("train.py", "run.yaml", *settings, "trainer.max_epochs=2", f"output_dir={tmp_path / 'whole'}")
    command("train.py", "run.yaml", *settings, "trainer.max_epochs=1", f"output_dir={tmp_path / 'parts'}")
    command("train.py", str(tmp_path / "parts"), "trainer.resume=last", "trainer.max_epochs=2")
    assert_alike(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_checkpoints_are_those_of_any_other_strategy(command, train, tmp_path):
    (tmp_path / "run.yaml").write_text("generator: {name: mlp, hidden_size: 16}\noptimizer: {schedule: constant}\n")
    for name, epochs in (("alone", 4), ("changing", 2)):
        own = [f"trainer.max_epochs={epochs}", "trainer.devices=1", f"output_dir={tmp_path / name}"]
        assert train("run.yaml", *SMALL, *own) == 0
    run = [str(tmp_path / "changing"), "trainer.resume=last"]
    command("train.py", *run, "trainer.max_epochs=3", *FSDP)
    assert train(*run, "trainer.max_epochs=4", "trainer.strategy=auto", "trainer.devices=1") == 0
    one, other = rows(tmp_path / "alone"), rows(tmp_path / "changing")
    assert other[-1] == pytest.approx(one[-1], rel=1e-4)


@pytest.mark.slow
def test_each_device_has_its_share_of_parameters_and_of_what_adam_keeps(tmp_path):
    (tmp_path / "run.yaml").write_text("generator: {name: mlp, hidden_size: 64}\n")
    (tmp_path / "halves.py").write_text(HALVES)
    process = subprocess.run(
        [sys.executable, "halves.py", *SMALL],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    for rank in range(2):
        device = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert device["own"] == pytest.approx(device["whole"] / 2, rel=1e-3)
        assert device["averages"] == [device["own"]] * 2


def test_what_every_device_needs_whole_is_not_sharded(train, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("generator: {name: exact, fit: descent}\n")
    larger = ["leaked.width=12", "data.image_size=16"]
    assert train("run.yaml", *SMALL, *larger, "trainer.strategy=fsdp", f"output_dir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert "trainer.strategy: fsdp" in error
    assert "ExactGenerator" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["trainer.channels_last=true"], "trainer.channels_last"),
        (["optimizer.name=sgd", "optimizer.momentum=0"], "optimizer.momentum"),
    ],
)
def test_what_does_not_go_with_sharding_is_named(train, tmp_path, capsys, settings, named):
    (tmp_path / "run.yaml").write_text("generator: {name: hybrid}\n")
    assert train("run.yaml", *SMALL, "trainer.strategy=fsdp", *settings, f"output_dir={tmp_path / 'run'}") == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.slow
def test_what_has_nothing_to_train_needs_no_strategy(command, tmp_path, strategy):
    (tmp_path / "run.yaml").write_text("generator: {name: exact}\ntrainer: {max_epochs: 1}\n")
    own = ["trainer.devices=2", f"trainer.strategy={strategy}", f"output_dir={tmp_path / 'run'}"]
    output = command("train.py", "run.yaml", *SMALL, "data.image_size=16", *own)
    assert output.count("epoch 1/1") == 1, "one run of two processes, not two of one"
