"""Real runs in one process and in several, that are to be the same bit for bit."""

import csv

import pytest
import torch
from small_run import SMALL

from gitlight.runs import load_checkpoint

DESCENT = [
    *("generator.name=exact", "generator.fit=descent", "data.image_size=16", "gradients.dtype=float64"),
    *("data.n_public_images=192", "data.batch_size=192", "optimizer.name=sgd", "optimizer.momentum=0"),
    *("optimizer.learning_rate=0.9", "optimizer.schedule=constant", "trainer.max_epochs=50"),
    *("trainer.check_val_every_n_epoch=50", "trainer.limit_val_batches=1"),
]
FIFTY_STEPS = ["data.n_public_images=800", "data.image_size=16", "data.horizontal_flip=true", "trainer.max_epochs=1"]
HYBRID = ["generator.name=hybrid", "generator.channels=8", "generator.blocks=1", *FIFTY_STEPS]
COARSE = ["generator.name=coarse", "generator.parameters=100000", *FIFTY_STEPS]
MLP = ["generator.name=mlp", "generator.hidden_size=32", *FIFTY_STEPS]


def losses_of(run):
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def weights_of(run):
    return load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


SHORT = ["data.n_public_images=48", "trainer.max_epochs=2"]  # six steps


def assert_same(run, other):
    ours, theirs = weights_of(run), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    # The loss of exact's descent is a sum over layers, too, which processes make in their own order.
    assert losses_of(run) == pytest.approx(losses_of(other), rel=1e-15)
    assert len(losses_of(run)) == 50


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        pytest.param([*MLP, "trainer.virtual_ranks=4"], [4], id="mlp"),
        pytest.param([*HYBRID, "trainer.virtual_ranks=2"], [2], id="hybrid", marks=pytest.mark.slow),
        pytest.param([*COARSE, "trainer.virtual_ranks=4"], [2], id="coarse", marks=pytest.mark.slow),
        pytest.param([*DESCENT, "trainer.virtual_ranks=4"], [4], id="exact", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_trains_the_same_weights(command, train, tmp_path, settings, processes):
    (tmp_path / "run.yaml").write_text("channel: [{name: gaussian_noise, relative_std: 0.0001}]\n")
    own = {setting.partition("=")[0] for setting in settings}
    settings = ["run.yaml", *(one for one in SMALL if one.partition("=")[0] not in own), *settings]
    assert train(*settings, "trainer.devices=1", f"output_dir={tmp_path / 'one'}") == 0
    for count in processes:
        run = tmp_path / str(count)
        command("train.py", *settings, f"trainer.devices={count}", f"output_dir={run}")
        assert_same(tmp_path / "one", run)


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes_as_if_nothing_had_been(command, train, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "generator: {name: mlp, hidden_size: 32}\noptimizer: {schedule: constant, warmup_fraction: 0}\n"
        "data: {horizontal_flip: true}\ntrainer: {virtual_ranks: 2, max_epochs: 4}\n"
    )
    settings = ["run.yaml", *SMALL, "data.n_public_images=160"]  # ten steps an epoch
    settings = [one for one in settings if one != "data.n_public_images=96"]
    assert train(*settings, "trainer.max_epochs=5", f"output_dir={tmp_path / 'whole'}") == 0
    run = f"output_dir={tmp_path / 'parts'}"
    command("train.py", *settings, "trainer.max_epochs=2", "trainer.devices=2", run)
    assert train(*settings, "trainer.max_epochs=3", "trainer.resume=last", run) == 0
    command("train.py", *settings, "trainer.max_epochs=5", "trainer.devices=2", "trainer.resume=last", run)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_with_virtual_ranks_does_not_go_on_without_them(train, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        "generator: {name: mlp, hidden_size: 32}\noptimizer: {schedule: constant, warmup_fraction: 0}\n"
    )
    settings = ["run.yaml", *(one for one in SMALL if not one.startswith("data.n_public")), *SHORT]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*settings, "trainer.virtual_ranks=2", f"output_dir={whole}") == 0
    assert train(*settings, "trainer.virtual_ranks=2", "trainer.max_steps=4", f"output_dir={parts}") == 0
    before = (parts / "config.yaml").read_bytes()
    capsys.readouterr()
    assert train(*settings, "trainer.resume=auto", f"output_dir={parts}") == 2
    assert "(trainer.virtual_ranks: 2 there, None now). A run goes on with its own" in capsys.readouterr().err
    assert (parts / "config.yaml").read_bytes() == before
    assert train(str(parts), "trainer.resume=auto", "trainer.max_steps=-1") == 0
    assert load_checkpoint(parts / "checkpoints" / "last.ckpt")["global_step"] == 6
    ours, theirs = weights_of(whole), weights_of(parts)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_operations_of_a_step_are_the_generators_with_virtual_ranks_too(train, tmp_path):
    (tmp_path / "run.yaml").write_text("generator: {name: mlp, hidden_size: 32}\n")
    counted = []
    for count in ("null", "2"):
        run = tmp_path / count
        assert (
            train("run.yaml", *SMALL, "trainer.max_steps=1", f"trainer.virtual_ranks={count}", f"output_dir={run}") == 0
        )
        callbacks = load_checkpoint(run / "checkpoints" / "last.ckpt")["callbacks"]
        counted.append(callbacks["Throughput"]["flops_per_pair"])
    assert counted[0] == counted[1] > 0
