from pathlib import Path

import optuna
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from optuna.trial import TrialState
from tiny_run import Fit, TinyModule

from gitlight.callbacks import build_callbacks
from gitlight.callbacks.checkpoints import last_checkpoint
from gitlight.callbacks.prune_trial import PruneTrial
from gitlight.config import Config
from gitlight.errors import ConfigError, DatabaseError
from gitlight.sweep.study import FINISHED, METRIC, PRUNED_AFTER, TERMINATION, open_storage
from gitlight.sweep.trial import SweepTrial


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    """A study whose trials are judged at their second validation: about the best third goes on."""
    study = optuna.create_study(
        storage=open_storage(f"sqlite:///{tmp_path / 'study.db'}", shared=False),
        study_name="mine",
        direction="maximize",
    )
    study.set_user_attr(METRIC, "val/psnr")
    study.set_user_attr(TERMINATION, [2, 3])
    return study


def callback(study: optuna.Study, folder: Path) -> PruneTrial:
    number = study.ask().number
    return PruneTrial(SweepTrial(f"sqlite:///{folder / 'study.db'}", "mine", number), Config())


class Quality(TinyModule):
    """Logs a quality that falls by one each epoch."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first

    def on_validation_epoch_end(self) -> None:
        self.log("val/psnr", torch.tensor(self.first - self.current_epoch))


class KilledError(Exception):
    """Stands in for SIGKILL."""


class MortalTrial(PruneTrial):
    """Dies after its report in an epoch, before that epoch's checkpoint; or after all, before it can say so."""

    last_epoch = 99
    cannot_say_its_end = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.cannot_say_its_end:
            raise KilledError
        super().on_fit_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.current_epoch == self.last_epoch:
            raise KilledError


def test_each_validation_is_reported_and_the_end_said(study: optuna.Study, fit: Fit, tmp_path: Path) -> None:
    fit([callback(study, tmp_path)], Quality(5.0), max_epochs=3)
    (trial,) = study.trials
    assert trial.intermediate_values == {1: 5.0, 2: 4.0, 3: 3.0}
    assert trial.user_attrs == {FINISHED: True}
    assert trial.state == TrialState.RUNNING  # its sweep concludes it


def test_a_trial_that_is_worse_is_stopped_at_the_bracket(study: optuna.Study, fit: Fit, tmp_path: Path) -> None:
    fit([callback(study, tmp_path)], Quality(5.0), max_epochs=4)
    trainer = fit([callback(study, tmp_path)], Quality(2.0), max_epochs=4)
    good, bad = study.trials
    assert list(good.intermediate_values) == [1, 2, 3, 4]
    assert bad.intermediate_values == {1: 2.0, 2: 1.0}
    assert bad.user_attrs == {PRUNED_AFTER: 2, FINISHED: True}
    assert trainer.current_epoch == 2


def test_a_killed_trial_counts_its_validations_on(study: optuna.Study, fit: Fit, tmp_path: Path) -> None:
    trial = SweepTrial(f"sqlite:///{tmp_path / 'study.db'}", "mine", study.ask().number)
    mortal = MortalTrial(trial, Config())
    mortal.last_epoch = 1
    with pytest.raises(KilledError):
        fit([mortal, last_checkpoint(tmp_path)], Quality(5.0), max_epochs=4)
    assert study.trials[0].intermediate_values == {1: 5.0, 2: 4.0}
    assert FINISHED not in study.trials[0].user_attrs
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    fit(
        [MortalTrial(trial, Config()), last_checkpoint(tmp_path)], Quality(5.0), max_epochs=4, ckpt_path=str(checkpoint)
    )
    assert study.trials[0].intermediate_values == {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}


@pytest.mark.parametrize("saved", [False, True])
def test_a_trial_that_was_judged_and_then_killed_does_not_go_on(
    study: optuna.Study, fit: Fit, tmp_path: Path, saved: bool
) -> None:
    fit([callback(study, tmp_path)], Quality(5.0), max_epochs=4)
    trial = SweepTrial(f"sqlite:///{tmp_path / 'study.db'}", "mine", study.ask().number)
    mortal = MortalTrial(trial, Config())
    mortal.last_epoch, mortal.cannot_say_its_end = (99, True) if saved else (1, False)
    with pytest.raises(KilledError):
        fit([mortal, last_checkpoint(tmp_path)], Quality(2.0), max_epochs=4)
    assert study.trials[1].user_attrs == {PRUNED_AFTER: 2}
    trainer = fit(
        [MortalTrial(trial, Config()), last_checkpoint(tmp_path)],
        Quality(2.0),
        max_epochs=4,
        ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"),
    )
    assert trainer.current_epoch == 2
    assert study.trials[1].intermediate_values == {1: 2.0, 2: 1.0}
    assert study.trials[1].user_attrs == {PRUNED_AFTER: 2, FINISHED: True}


def test_a_judgement_is_not_lost_with_a_trial_that_is_killed_before_it_is_written_down(
    study: optuna.Study, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KilledError

    fit([callback(study, tmp_path)], Quality(5.0), max_epochs=4)
    trial = SweepTrial(f"sqlite:///{tmp_path / 'study.db'}", "mine", study.ask().number)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "set_user_attr", killed)
        with pytest.raises(KilledError):
            fit([PruneTrial(trial, Config()), last_checkpoint(tmp_path)], Quality(2.0), max_epochs=4)
    assert study.trials[1].user_attrs == {}
    checkpoint = str(tmp_path / "checkpoints" / "last.ckpt")
    fit([PruneTrial(trial, Config()), last_checkpoint(tmp_path)], Quality(2.0), max_epochs=4, ckpt_path=checkpoint)
    assert study.trials[1].intermediate_values == {1: 2.0, 2: 1.0}
    assert study.trials[1].user_attrs == {PRUNED_AFTER: 2, FINISHED: True}


def test_a_metric_that_no_run_logs_is_named_before_training(study: optuna.Study, fit: Fit, tmp_path: Path) -> None:
    study.set_user_attr(METRIC, "val/pnsr")
    module = TinyModule()
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(
        ConfigError, match=r"metric\.name: val/pnsr \(of the sweep mine\) is not .*Did you mean val/psnr"
    ):
        fit([callback(study, tmp_path)], module, max_epochs=1)
    assert all(map(torch.equal, module.parameters(), before))


def test_a_metric_that_is_not_logged_after_all_is_named(study: optuna.Study, fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric\.name: val/psnr is not logged by this run.*val/loss"):
        fit([callback(study, tmp_path)], TinyModule(), max_epochs=1)


def test_a_database_that_cannot_be_opened_is_no_fault_of_the_trial(fit: Fit, tmp_path: Path) -> None:
    lost = SweepTrial(f"sqlite:///{tmp_path}/gone/study.db", "mine", 0)
    with pytest.raises(DatabaseError, match=r"gone/study\.db failed: unable to open database file\. Once it works"):
        fit([PruneTrial(lost, Config())], TinyModule(), max_epochs=1)


def test_only_trials_of_a_sweep_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reports() -> bool:
        return any(isinstance(one, PruneTrial) for one in build_callbacks(Config(), tmp_path))

    assert not reports()
    for name, value in SweepTrial("sqlite://", "mine", 3).environment().items():
        monkeypatch.setenv(name, value)
    assert reports()
