import csv
import os
import signal

import pytest
from small_run import SMALL

from gitlight.runs import load_checkpoint

TWO_PROCESSES = ["trainer.devices=2"]


def logged(run, column):
    with (run / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


SLOW = [
    pytest.param(*case, marks=pytest.mark.slow) for case in (("hybrid", 1), ("hybrid", 2), ("coarse", 1), ("mlp", 2))
]


@pytest.mark.parametrize(("generator", "client_batch_size"), [("mlp", 1), *SLOW])
def test_two_processes_follow_the_curve_of_one(command, train, tmp_path, generator, client_batch_size):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"generator: {{name: {generator}}}\ntrainer: {{max_epochs: 2}}\n"
        # Enough pairs for the closed-form fits: where they are underdetermined, rounding decides.
        "data: {horizontal_flip: true}\nchannel: [{name: gaussian_noise, relative_std: 0.0001}]\n"
    )
    # The two ranks' shares of the validation leaks differ, even in their number of batches: 33 and 32 in batches of 32.
    settings = [*SMALL, f"data.client_batch_size={client_batch_size}", f"data.n_validation={65 * client_batch_size}"]
    settings += ["data.n_public_images=512", "data.batch_size=64"]
    settings += (
        ["generator.channels=8", "generator.blocks=1"] if generator == "hybrid" else ["generator.hidden_size=32"]
    )
    assert train(str(config), *settings, "trainer.devices=1", f"output_dir={tmp_path / 'one'}") == 0
    command("train.py", str(config), *settings, *TWO_PROCESSES, f"output_dir={tmp_path / 'two'}")
    for column in ("train/loss", "val/loss", "val/mse", "val/psnr", "val/ssim"):
        one, two = logged(tmp_path / "one", column), logged(tmp_path / "two", column)
        assert one
        assert two == pytest.approx(one, rel=1e-4), column


@pytest.mark.slow
def test_over_fifty_steps_two_processes_differ_from_one_by_rounding(command, train, tmp_path):
    """Adam magnifies it where it divides by gradients that are rounding themselves: below ``optimizer.epsilon``."""
    (tmp_path / "run.yaml").write_text(
        "generator: {name: hybrid, channels: 8, blocks: 1}\noptimizer: {epsilon: 1.0e-6}\ntrainer: {max_epochs: 1}\n"
        # Fits magnify rounding, too: to so few pairs, and to those that nothing blurs.
        "gradients: {dtype: float64}\n"
        "channel: [{name: gaussian_noise, relative_std: 0.0001}]\n"
    )
    settings = ["run.yaml", *SMALL, "data.n_public_images=800"]
    assert train(*settings, "trainer.devices=1", f"output_dir={tmp_path / 'one'}") == 0
    command("train.py", *settings, *TWO_PROCESSES, f"output_dir={tmp_path / 'two'}")
    one, two = logged(tmp_path / "one", "train/loss"), logged(tmp_path / "two", "train/loss")
    assert len(one) == 50
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_descent_takes_the_steps_of_one_process(command, train, tmp_path):
    """With 400 leaks there are more than twice the 192 inputs of the last layer, and with half of them not."""
    (tmp_path / "run.yaml").write_text(
        "data: {n_public_images: 416, batch_size: 400, image_size: 16}\n"
        "leaked: {width: 12}\n"
        "gradients: {dtype: float64}\n"
        "generator: {name: exact, fit: descent}\n"
        "optimizer: {name: sgd, momentum: 0, learning_rate: 0.9, schedule: constant, warmup_fraction: 0}\n"
        "trainer: {max_epochs: 6, check_val_every_n_epoch: 6, limit_val_batches: 1}\n"
    )
    own = {"data.n_public_images", "data.batch_size", "leaked.width"}
    settings = ["run.yaml", *(setting for setting in SMALL if setting.partition("=")[0] not in own)]
    assert train(*settings, "trainer.devices=1", f"output_dir={tmp_path / 'one'}") == 0
    command("train.py", *settings, *TWO_PROCESSES, f"output_dir={tmp_path / 'two'}")
    one, two = logged(tmp_path / "one", "train/loss"), logged(tmp_path / "two", "train/loss")
    assert len(one) == 6
    # Inverses of moments with a condition of 1e10 magnify rounding.
    assert two == pytest.approx(one, rel=1e-4)


def test_a_batch_that_cannot_be_shared_is_named(command, tmp_path):
    (tmp_path / "run.yaml").write_text("generator: {name: mlp, hidden_size: 8}\n")
    output = command("train.py", "run.yaml", *SMALL, "data.batch_size=15", *TWO_PROCESSES, code=2)
    assert "data.batch_size: 15" in output
    assert "multiple of 2" in output


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(command, train, tmp_path):
    """A signal to one of them stops both, the loss of one ends both, and a single one continues the curve."""
    config = tmp_path / "run.yaml"
    config.write_text(
        "generator: {name: mlp, hidden_size: 8}\ndata: {horizontal_flip: true}\n"
        "channel: [{name: gaussian_noise, relative_std: 0.001}]\n"
        "trainer: {max_epochs: 20, check_val_every_n_epoch: 10, checkpoint_every_n_steps: 4, resume: auto}\n"
    )
    run = tmp_path / "two"
    last = run / "checkpoints" / "last.ckpt"
    settings = [str(config), *SMALL, f"output_dir={run}"]
    assert train(str(config), *SMALL, f"output_dir={tmp_path / 'one'}") == 0

    process = command.start("train.py", *settings, *TWO_PROCESSES)
    command.wait_for(process, last.exists)
    os.kill(command.child_of(process), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert output.count("SIGTERM: stopped at step ") == 1, "the first one says so"
    stopped_at = load_checkpoint(last)["global_step"]

    process = command.start("train.py", *settings, *TWO_PROCESSES)
    command.wait_for(process, lambda: load_checkpoint(last)["global_step"] > stopped_at)
    os.kill(command.child_of(process), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "was killed by SIGKILL. The run ends" in output
    assert "Traceback" not in output

    assert stopped_at < load_checkpoint(last)["global_step"] < 20 * 6
    assert train(*settings) == 0
    assert logged(run, "train/loss") == pytest.approx(logged(tmp_path / "one", "train/loss"), rel=1e-4)


@pytest.mark.slow
def test_ctrl_c_stops_two_processes_together(command, tmp_path, ctrl_c):
    """A terminal sends it to both of them."""
    (tmp_path / "run.yaml").write_text("generator: {name: mlp, hidden_size: 8}\ntrainer: {max_epochs: 500}\n")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    process = command.start("train.py", "run.yaml", *SMALL, *TWO_PROCESSES, f"output_dir={tmp_path / 'run'}")
    command.wait_for(process, last.exists)
    for one in (process.pid, command.child_of(process)):
        os.kill(one, ctrl_c)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.count("SIGINT: stopped at step ") == output.count("SIGINT: stopping") == 1, "the first one says so"
    assert "Traceback" not in output
