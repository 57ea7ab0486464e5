import errno
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gitlight.cli import evaluate_command, settings_help, train_command
from gitlight.errors import BusyFolderError, CheckpointError, DatabaseError, LostRankError, RunStopped, UnwrittenError
from gitlight.stop_signals import STOP_SIGNALS
from gitlight.sweep.trial import INTERRUPTED, SweepTrial

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_shows_usage_and_settings_without_loading_torch(script):
    code = f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
    code += f"try:\n    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\nexcept SystemExit as end:\n"
    code += "    assert end.code == 0\nassert 'torch' not in sys.modules, 'help must not wait for torch'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"usage: python {script}" in result.stdout
    assert "trainer.max_epochs=10" in result.stdout
    assert "gitlight/config/" in result.stdout


def test_importing_gitlight_does_not_load_torch():
    code = "import sys, gitlight; assert 'torch' not in sys.modules"
    code += "; gitlight.Architecture; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_lists_the_settings_of_every_generator():
    text = settings_help()
    for setting in ("generator.hidden_layers=2", "generator.exact_depth=null", "channel[i].relative_std=0.01"):
        assert setting in text


@pytest.mark.parametrize(
    "override",
    [
        "data.imagesize=3",
        "data.name=fodler",
        "data.name=folder",
        "trainer.resume=last",
        "trainer.devices=abc",
        "trainer.strategy=dpp",
        "trainer.accelerator=tpuu",
        "trainer.accelerator=mps",
        "trainer.max_time=abc",
        "trainer.profiler=foo",
        "trainer.limit_train_batches=abc",
    ],
)
def test_mistakes_end_with_code_2_and_one_message(override, tmp_path, capsys):
    code = train_command([str(DEMO), override, f"output_dir={tmp_path / 'run'}"], DEMO)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert override.split("=")[0] in captured.err
    assert not (tmp_path / "run").exists(), "a run that cannot start writes nothing"


def test_evaluate_without_a_run_shows_its_usage(capsys):
    assert evaluate_command([]) == 2
    assert "usage: python evaluate.py" in capsys.readouterr().err


def test_a_config_may_have_an_equals_sign_in_its_name(tmp_path, capsys):
    path = tmp_path / "lr=0.1.yaml"
    path.write_text("datta: 1")
    assert train_command([str(path)], DEMO) == 2
    assert "datta: no such setting" in capsys.readouterr().err


@pytest.fixture
def signals_as_before():
    # What comes in spite of all ends no test.
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_as_before")
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunStopped(signal.SIGTERM, Path("last.ckpt"), 7), 143, "SIGTERM: stopped at step 7; last.ckpt continues"),
        (RunStopped(signal.SIGUSR1, Path("last.ckpt"), 7), 128 + signal.SIGUSR1, "SIGUSR1: stopped at step 7"),
        (RunStopped(signal.SIGINT, Path("last.ckpt"), 7), 130, "SIGINT: stopped at step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (LostRankError("rank 1 was killed."), 1, "error: rank 1 was killed."),
        (OSError(errno.ENOSPC, "No space left on device", "metrics.csv"), 2, "metrics.csv cannot be written (No space"),
        (OSError(errno.EFBIG, "File too large", "metrics.csv"), 2, "metrics.csv cannot be written (File too large); "),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, f"{Path('runs') / 'demo'} cannot be written (Disk quota exc"),
    ],
)
def test_how_a_run_ends_shows_in_its_exit_code(monkeypatch, capsys, error, code, message):
    def end(config):
        raise error

    monkeypatch.setattr("gitlight.cli._train", end)
    assert train_command([], DEMO) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "metrics.csv"), INTERRUPTED),
        (UnwrittenError("last.ckpt cannot be written"), INTERRUPTED),
        (DatabaseError("The sweep's database failed"), INTERRUPTED),
        (BusyFolderError("output_dir: another run is writing runs/demo"), INTERRUPTED),
        (CheckpointError("last.ckpt is damaged"), 2),
    ],
)
def test_a_trial_tells_its_sweep_that_its_settings_are_not_to_blame(monkeypatch, error, code):
    def end(config):
        raise error

    monkeypatch.setattr("gitlight.cli._train", end)
    monkeypatch.setattr("gitlight.cli.end_with_the_sweep", lambda: None)
    for name, value in SweepTrial("sqlite://", "mine", 3).environment().items():
        monkeypatch.setenv(name, value)
    assert train_command([], DEMO) == code


@pytest.mark.usefixtures("signals_as_before")
def test_what_ends_by_a_signal_keeps_its_exit_code_through_another(monkeypatch):
    def end(config):
        raise RunStopped(signal.SIGUSR1, Path("last.ckpt"), 7)

    monkeypatch.setattr("gitlight.cli._train", end)
    assert train_command([], DEMO) == 128 + signal.SIGUSR1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == [signal.SIG_IGN] * 2


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_what_to_do_next_can_be_copied_whatever_the_folder_is_called(monkeypatch, capsys, tmp_path, checkpoint):
    run = tmp_path / "it's a run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / f"{checkpoint}.ckpt").touch()
    monkeypatch.setattr("gitlight.training.train", lambda config: run)
    assert train_command([], DEMO) == 0
    (words,) = (line.partition("next: ")[2] for line in capsys.readouterr().out.splitlines() if "next: " in line)
    given = [] if checkpoint == "best" else ["evaluation.checkpoint=last"]  # without a validation there is no best one
    assert shlex.split(words) == ["python", "evaluate.py", str(run), *given]
