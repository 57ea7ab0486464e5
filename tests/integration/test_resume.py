import csv
import errno
import os
import re
import shutil
import signal

import pytest
import torch
from small_run import SMALL

from gitlight.callbacks.max_time import MaxTime
from gitlight.cli import train_command
from gitlight.runs import load_checkpoint, run_lock
from gitlight.training import GITModule

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


def same_weights(one, other, steps=EPOCHS * STEPS_AN_EPOCH):
    first, second = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (one, other))
    assert first["global_step"] == second["global_step"] == steps
    for counted in ("epoch_progress", "epoch_loop.batch_progress"):
        assert first["loops"]["fit_loop"][counted] == second["loops"]["fit_loop"][counted]
    return all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())


@pytest.fixture(scope="module")
def of_two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_epochs")
    (folder / "run.yaml").write_text(CONFIG)
    # The schedule is the only thing that is to know where a run would have ended.
    settings = [*SMALL, "optimizer.schedule=constant", "trainer.max_epochs=2", f"output_dir={folder / 'run'}"]
    assert train_command([str(folder / "run.yaml"), *settings], folder / "run.yaml") == 0
    return folder / "run"


def stopped_at(monkeypatch, step, number):
    """From now on the process sends itself a signal in this step."""
    training_step = GITModule.training_step

    def and_a_signal(self, pair, batch_idx):
        if self.trainer.global_step == step:
            os.kill(os.getpid(), number)
        return training_step(self, pair, batch_idx)

    monkeypatch.setattr(GITModule, "training_step", and_a_signal)


@pytest.mark.slow
def test_a_killed_and_stopped_run_resumed_ends_like_one_never_interrupted(
    command, train, config, tmp_path, monkeypatch, capsys
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    last = killed / "checkpoints" / "last.ckpt"
    assert train(str(config), *SMALL, f"output_dir={whole}") == 0

    resumable = [*SMALL, f"output_dir={killed}", "trainer.resume=auto", "trainer.checkpoint_every_n_steps=4"]
    process = command.start("train.py", str(config), *resumable)
    command.kill_when(process, last.exists)
    assert load_checkpoint(last)["global_step"] % STEPS_AN_EPOCH, "within an epoch"

    # In the middle of the third epoch, then in the last step of it, after which there is a validation.
    for step, number, code in ((14, signal.SIGTERM, 143), (17, signal.SIGUSR1, 138)):
        with monkeypatch.context() as patch:
            stopped_at(patch, step, number)
            assert train(str(config), *resumable) == code
        assert f"{number.name}: stopped at step {step + 1}; {last} continues" in capsys.readouterr().err
        assert load_checkpoint(last)["global_step"] == step + 1
    assert load_checkpoint(killed / "checkpoints" / "last-1.ckpt")["global_step"] == 16
    assert train(str(config), *resumable) == 0

    assert metrics(killed) == metrics(whole)
    assert same_weights(killed, whole)
    assert not (tmp_path / "killed.1").exists()


def test_ctrl_c_stops_a_run_with_a_checkpoint(train, run, monkeypatch, capsys, ctrl_c):
    last = run / "checkpoints" / "last.ckpt"
    stopped_at(monkeypatch, STEPS_AN_EPOCH + 2, ctrl_c)
    assert train(str(run), "trainer.resume=last", "trainer.max_epochs=2") == 130
    assert f"SIGINT: stopped at step {STEPS_AN_EPOCH + 3}; {last} continues from there (trainer.resume=last)" in (
        capsys.readouterr().err
    )
    assert load_checkpoint(last)["global_step"] == STEPS_AN_EPOCH + 3


def test_ctrl_c_during_the_fits_ends_a_run_with_a_word(train, config, tmp_path, monkeypatch, capsys, ctrl_c):
    monkeypatch.setattr("gitlight.training.fit_in_closed_form", lambda *_: os.kill(os.getpid(), ctrl_c))
    assert train(str(config), *SMALL, f"output_dir={tmp_path / 'run'}") == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [STEPS_AN_EPOCH, STEPS_AN_EPOCH + 3])
def test_a_run_that_max_steps_ended_goes_on_like_one_never_ended(train, config, of_two_epochs, tmp_path, steps, capsys):
    ended = tmp_path / "ended"
    settings = [*SMALL, "optimizer.schedule=constant", "trainer.max_epochs=2", f"output_dir={ended}"]
    assert train(str(config), *settings, f"trainer.max_steps={steps}") == 0
    said = capsys.readouterr().out
    assert ("epoch 2/2, up to step 9" in said) == (steps == STEPS_AN_EPOCH + 3)
    assert said.count("val/psnr") == 1, "of the validation that there was"
    assert load_checkpoint(ended / "checkpoints" / "last.ckpt")["global_step"] == steps
    assert train(str(config), *settings, "trainer.max_steps=100", "trainer.resume=last") == 0
    assert metrics(ended) == metrics(of_two_epochs)
    assert same_weights(ended, of_two_epochs, 2 * STEPS_AN_EPOCH)


def test_a_run_that_max_time_ended_goes_on_like_one_never_ended(
    train, config, of_two_epochs, tmp_path, monkeypatch, capsys
):
    ended = tmp_path / "ended"
    settings = [*SMALL, "optimizer.schedule=constant", "trainer.max_epochs=2", f"output_dir={ended}"]

    def at_step_eight(timer, trainer):
        trainer.should_stop = trainer.global_step == 8

    with monkeypatch.context() as patch:
        patch.setattr(MaxTime, "_check_time_remaining", at_step_eight)
        assert train(str(config), *settings, "trainer.max_time=00:00:01:00") == 0
    assert "epoch 2/2, up to step 8" in capsys.readouterr().out
    assert train(str(config), *settings, "trainer.resume=last") == 0
    (of_its_end,) = [row for row in metrics(ended) if row not in metrics(of_two_epochs)]
    assert of_its_end["step"] == "7"
    assert of_its_end["val/psnr"]
    assert same_weights(ended, of_two_epochs, 2 * STEPS_AN_EPOCH)


def test_no_checkpoint_is_of_a_step_whose_batches_are_being_summed_up(train, tmp_path):
    (tmp_path / "run.yaml").write_text("generator: {name: mlp, hidden_size: 8}\ntrainer: {max_epochs: 2}\n")
    # An epoch ends with a step of one batch alone, after which the next begins with one of two.
    uneven = ["trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train("run.yaml", *SMALL, *uneven, "trainer.checkpoint_every_n_steps=3", f"output_dir={whole}") == 0
    shutil.copytree(whole, resumed)
    assert train(str(resumed), "trainer.resume=previous") == 0
    assert metrics(resumed) == metrics(whole)
    assert same_weights(resumed, whole, steps=6)


def test_a_damaged_checkpoint_is_gone_past(train, run, capsys):
    last = run / "checkpoints" / "last.ckpt"
    shutil.copy(last, run / "checkpoints" / "last-1.ckpt")
    last.write_bytes(last.read_bytes()[:5000])
    assert train(str(run), "trainer.resume=auto") == 2
    assert "trainer.resume=previous goes on from the checkpoint before it, last-1.ckpt" in capsys.readouterr().err
    assert train(str(run), "trainer.resume=previous", "trainer.max_epochs=2") == 0
    assert f"going on from {last.with_name('last-1.ckpt')}, of step {STEPS_AN_EPOCH}\n" in capsys.readouterr().out
    assert load_checkpoint(last)["global_step"] == 2 * STEPS_AN_EPOCH
    assert load_checkpoint(run / "checkpoints" / "last-1.ckpt")["global_step"] == STEPS_AN_EPOCH


def test_a_run_on_a_full_disk_ends_with_one_message(train, run, capsys, monkeypatch):
    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gitlight.checkpoint_io.torch.save", full)
    assert train(str(run), "trainer.resume=last", "trainer.max_epochs=2") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: The checkpoint {run / 'checkpoints'}")
    assert "No space left on device" in error
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == STEPS_AN_EPOCH


def test_the_checkpoint_of_a_run_that_another_process_writes_is_not_read(train, run, capsys):
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    with run_lock(run):
        assert train(str(run), "trainer.resume=auto") == 2
    assert "output_dir: another run is writing" in capsys.readouterr().err


def test_images_may_have_moved_and_computing_may_differ(train, run):
    moved = ["data.root=elsewhere", "data.num_workers=1", "gradients.memory_limit_gb=1", "gradients.method=loop"]
    assert train(str(run), "trainer.resume=last", "trainer.max_epochs=2", *moved) == 0


def test_resuming_can_prolong_a_finished_run(train, run):
    assert train(str(run), "trainer.resume=last", "trainer.max_epochs=2") == 0
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 2 * STEPS_AN_EPOCH


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["trainer.max_epochs=1"],
            "error: trainer.max_epochs: 1, and .*last.ckpt is of 2 epochs: nothing",
        ),
        (["trainer.max_steps=5"], "error: trainer.max_steps: 5, and .*last.ckpt is of 12 steps: nothing"),
    ],
)
def test_an_end_before_the_checkpoint_is_refused_and_its_own_is_not(
    train, of_two_epochs, tmp_path, capsys, settings, message
):
    run = shutil.copytree(of_two_epochs, tmp_path / "run")
    before = (run / "config.yaml").read_bytes()
    assert train(str(run), "trainer.resume=last", *settings) == 2
    assert re.match(message, capsys.readouterr().err)
    assert (run / "config.yaml").read_bytes() == before
    assert train(str(run), "trainer.resume=auto") == 0


CHANGES = {
    "generator.channels=16": "generator.channels: 8 there, 16 now",
    "leaked.seed=5": "leaked.seed: 0 there, 5 now",
    "optimizer.learning_rate=0.5": "optimizer.learning_rate: 0.001 there, 0.5 now",
    "seed=7": "seed: 0 there, 7 now",
    "data.batch_size=32": "data.batch_size: 16 there, 32 now",
    "channel=[{name: pruning, fraction: 0.5}]": "channel: ",
}


@pytest.mark.parametrize(
    "damage",
    ["missing", "truncated", "weights alone", "another module's", "without loops", "another version", *CHANGES],
)
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
    elif damage == "another module's":
        content = torch.load(checkpoint, weights_only=True)
        torch.save({**content, "callbacks": {}}, checkpoint)
    elif damage == "without loops":
        content = torch.load(checkpoint, weights_only=True)
        torch.save({key: value for key, value in content.items() if key != "loops"}, checkpoint)
    elif damage == "another version":
        content = torch.load(checkpoint, weights_only=True)
        torch.save({**content, "gitlight_format": 99}, checkpoint)
    else:
        changed = [damage]
    capsys.readouterr()
    assert train(str(run), "trainer.resume=last", *changed) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "checkpoint" in error
    assert CHANGES.get(damage, "") in error
    assert (run / "metrics.csv").read_bytes() == before
