import os
import signal

import pytest

from gitlight.stop_signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_means_what_it_did_afterwards(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signal.getsignal(number) == before, "nothing to save yet"
        signals.listen()
        assert signals.received == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) == before
