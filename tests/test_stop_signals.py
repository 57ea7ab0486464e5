import multiprocessing
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gitlight.stop_signals import STOP_SIGNALS, StopSignals, heed_the_parent_alone


@pytest.fixture(autouse=True)
def ctrl_c_as_at_a_terminal() -> Iterator[None]:
    """Not ignored, as it is where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_means_what_it_did_afterwards(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.listen()
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) == before


def test_before_there_is_anything_to_save_a_warning_ends_the_process_without_the_code_of_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    sigterm, sigusr1 = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) == sigterm
        os.kill(os.getpid(), signal.SIGUSR1)
    assert codes == [1]
    assert "nothing to save" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == sigusr1


def test_a_second_ctrl_c_is_the_systems(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as signals:
        signals.listen()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert "SIGINT: stopping with a checkpoint" in capfd.readouterr().err


def test_before_there_is_anything_to_save_ctrl_c_interrupts_without_lightnings_exit() -> None:
    def as_lightning() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(KeyboardInterrupt), StopSignals():
        as_lightning()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_ctrl_c_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as signals:
        signals.listen()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == 0


def wait(ready: multiprocessing.synchronize.Event) -> None:
    heed_the_parent_alone()
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_reads_images_is_ended_by_its_parent_alone(method: str) -> None:
    context = multiprocessing.get_context(method)
    ready = context.Event()
    process = context.Process(target=wait, args=(ready,))
    process.start()
    assert ready.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    other = os.fork()
    if other == 0:
        os.kill(process.pid, signal.SIGTERM)
        os._exit(0)
    os.waitpid(other, 0)
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert process.exitcode == 0


WARNED_WHILE_IT_READS = """
import os, signal
import gitlight.training
from gitlight import load_config

def read(*settings):
    os.kill(os.getpid(), signal.SIGUSR1)

gitlight.training.build_pairs = read
gitlight.training.train(load_config({config!r}, ["output_dir={folder}/run", "logging.wandb=off"]))
"""


def test_a_warning_while_images_are_read_is_not_taken_for_a_stop(tmp_path: Path) -> None:
    config = Path(__file__).parent.parent / "configs" / "demo.yaml"
    code = WARNED_WHILE_IT_READS.format(config=str(config), folder=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "SIGUSR1 came before the first step, and there is nothing to save" in done.stderr
