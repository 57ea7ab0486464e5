"""Stands in for ``train.py`` in a sweep: the same files and reports, without torch's ten seconds of imports.

Usage: quick_trial.py CONFIG.yaml optimizer.learning_rate=RATE output_dir=FOLDER [trainer.resume=last]. Each epoch takes
a moment; the metric is the rate plus the epoch. A rate above 100 fails, one above 50 hangs and ignores SIGTERM.
"""

import os
import signal
import sys
import time
from pathlib import Path

from gitlight.sweep.study import FINISHED, load_study, open_storage, trial_of
from gitlight.sweep.trial import end_with_the_sweep, trial_from_environment

EPOCHS = 4
SECONDS_AN_EPOCH = 0.25


def main() -> None:
    end_with_the_sweep()
    which = trial_from_environment()
    assert which is not None
    settings = dict(argument.split("=", 1) for argument in sys.argv[2:])
    rate, folder = float(settings["optimizer.learning_rate"]), Path(settings["output_dir"])
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=settings.get("trainer.resume") == "last")
    (folder / "process.txt").write_text(str(os.getpid()))
    done = int(checkpoint.read_text()) if "trainer.resume" in settings else 0
    storage = open_storage(which.storage, shared=False)
    trial = trial_of(load_study(storage, which.study), storage, which.number)
    if rate > 100:
        sys.exit("this rate is too large")
    if rate > 50:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    for epoch in range(done + 1, EPOCHS + 1):
        time.sleep(SECONDS_AN_EPOCH)
        if epoch not in trial.study.trials[which.number].intermediate_values:
            trial.report(rate + epoch, epoch)
        with (folder / "epochs.txt").open("a") as file:
            file.write(f"{epoch}\n")
        partial = checkpoint.with_suffix(".partial")
        partial.write_text(str(epoch))
        partial.replace(checkpoint)
    trial.set_user_attr(FINISHED, True)


if __name__ == "__main__":
    main()
