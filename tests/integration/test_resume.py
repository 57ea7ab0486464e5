import csv
import shutil

import pytest
import torch
from small_run import SMALL

from gitlight.cli import train_command
from gitlight.runs import load_checkpoint

EPOCHS = 4
STEPS_AN_EPOCH = 6  # 96 images in batches of 16


# Mirroring and channel noise are random numbers that a resumed run must find again.
CONFIG = (
    "generator: {name: hybrid, channels: 8, blocks: 1}\n"
    "data: {horizontal_flip: true}\n"
    "channel: [{name: gaussian_noise, relative_std: 0.001}]\n"
    f"trainer: {{max_epochs: {EPOCHS}}}\n"
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def of_one_epoch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_epoch")
    (folder / "run.yaml").write_text(CONFIG)
    settings = [*SMALL, f"output_dir={folder / 'run'}", "trainer.max_epochs=1"]
    assert train_command([str(folder / "run.yaml"), *settings], folder / "run.yaml") == 0
    return folder / "run"


@pytest.fixture
def run(of_one_epoch, tmp_path):
    """A run of one epoch, to continue."""
    return shutil.copytree(of_one_epoch, tmp_path / "run")


def metrics(run):
    with (run / "metrics.csv").open() as file:
        timeless = [{k: v for k, v in row.items() if not k.startswith("throughput")} for row in csv.DictReader(file)]
    return [row for row in timeless if any(value for key, value in row.items() if key not in ("epoch", "step"))]


def same_weights(one, other):
    first, second = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (one, other))
    assert first["global_step"] == second["global_step"] == EPOCHS * STEPS_AN_EPOCH
    return all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())


def test_a_killed_run_resumed_ends_like_one_never_interrupted(command, config, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command("train.py", str(config), *SMALL, f"output_dir={whole}")

    process = command.start("train.py", str(config), *SMALL, f"output_dir={killed}")
    command.kill_when(process, lambda: (killed / "reconstructions" / "epoch_0001.png").exists())
    step = load_checkpoint(killed / "checkpoints" / "last.ckpt")["global_step"]
    assert 0 < step < EPOCHS * STEPS_AN_EPOCH, "it was killed in the middle"
    command("train.py", str(killed), "trainer.resume=last")

    assert metrics(killed) == metrics(whole)
    assert same_weights(killed, whole)


def test_images_may_have_moved_and_computing_may_differ(train, run):
    moved = ["data.root=elsewhere", "data.num_workers=1", "gradients.memory_limit_gb=1", "gradients.method=loop"]
    assert train(str(run), "trainer.resume=last", "trainer.max_epochs=2", *moved) == 0


def test_resuming_can_prolong_a_finished_run(train, run):
    assert train(str(run), "trainer.resume=last", "trainer.max_epochs=2") == 0
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 2 * STEPS_AN_EPOCH


CHANGES = {
    "generator.channels=16": "generator.channels: 8 there, 16 now",
    "leaked.seed=5": "leaked.seed: 0 there, 5 now",
    "optimizer.learning_rate=0.5": "optimizer.learning_rate: 0.001 there, 0.5 now",
    "seed=7": "seed: 0 there, 7 now",
    "data.batch_size=32": "data.batch_size: 16 there, 32 now",
    "channel=[{name: pruning, fraction: 0.5}]": "channel: ",
}


@pytest.mark.parametrize("damage", ["missing", "truncated", "weights alone", *CHANGES])
def test_a_checkpoint_that_cannot_be_resumed_ends_with_one_message(train, run, capsys, damage):
    checkpoint = run / "checkpoints" / "last.ckpt"
    before = (run / "metrics.csv").read_bytes()
    changed = []
    if damage == "missing":
        checkpoint.unlink()
    elif damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    elif damage == "weights alone":
        weights = torch.load(checkpoint, weights_only=True)["state_dict"]  # not mapped: the file is written over
        torch.save({"state_dict": weights}, checkpoint)
    else:
        changed = [damage]
    capsys.readouterr()
    assert train(str(run), "trainer.resume=last", *changed) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "checkpoint" in error
    assert CHANGES.get(damage, "") in error
    assert (run / "metrics.csv").read_bytes() == before
