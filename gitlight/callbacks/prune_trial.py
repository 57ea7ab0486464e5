"""`PruneTrial`: a sweep's trial reports its metric at each validation, and ends where it is not worth going on."""

import math
from typing import Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from optuna.storages import RDBStorage

from gitlight.config import Config
from gitlight.errors import ConfigError
from gitlight.sweep.database import naming_database
from gitlight.sweep.metrics import check_metric
from gitlight.sweep.study import FINISHED, METRIC, PRUNED_AFTER, connect, load_study, trial_of
from gitlight.sweep.trial import SweepTrial


class PruneTrial(Callback):
    """Reports to the sweep's study after each validation, and stops the run if the study's pruner says so.

    Steps of the report are validations, from 1. Rank 0 reports and asks; the others do what it was told.

    Args:
        trial: which trial this run is.
        config: the run's, which says what it logs.
    """

    def __init__(self, trial: SweepTrial, config: Config) -> None:
        self._which = trial
        self._config = config
        self._validations = 0
        self._metric = ""
        self._trial: optuna.Trial | None = None

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were: a resumed trial counts on."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._validations = state_dict["validations"]

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the study.

        Raises:
            ConfigError: the run does not log the sweep's metric.
            OSError, DatabaseError: the study cannot be read or written, now or later.
        """
        with naming_database(self._which.storage):
            storage: RDBStorage = connect(self._which.storage, shared=False)
            study = load_study(storage, self._which.study)
            self._metric = study.user_attrs[METRIC]
            self._trial = trial_of(study, storage, self._which.number)
        leaked = getattr(getattr(pl_module, "generator", None), "architecture", None)
        names = None if leaked is None else leaked.parameter_shapes
        trains = any(parameter.requires_grad for parameter in pl_module.parameters())
        check_metric(self._metric, self._config, f"(of the sweep {self._which.study})", names, trains)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go no further where it was told to stop, and was killed before it could say that it had."""
        if trainer.strategy.broadcast(self._trial is not None and self._was_told_to_stop(self._trial)):
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, ask, and stop if so told.

        Raises:
            ConfigError: the run does not log the sweep's metric after all.
        """
        if trainer.sanity_checking:
            return
        self._validations += 1
        stop = False
        if self._trial is not None:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            with naming_database(self._which.storage):
                stop = self._report(self._trial, metrics)
        if trainer.strategy.broadcast(stop):
            trainer.should_stop = True

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that training came to its end, and not the process alone."""
        if self._trial is not None:
            with naming_database(self._which.storage):
                self._trial.set_user_attr(FINISHED, True)

    def _report(self, trial: optuna.Trial, metrics: dict[str, float]) -> bool:
        if self._metric not in metrics:
            logged = ", ".join(name for name in sorted(metrics) if name.startswith("val/"))
            raise ConfigError(
                f"metric.name: {self._metric} is not logged by this run. At a validation it logs: {logged}."
            )
        # A trial that was killed after its report and before its checkpoint does that epoch again.
        if self._validations not in study_reports(trial):
            trial.report(metrics[self._metric], self._validations)
        if self._was_told_to_stop(trial):
            return True
        if not trial.should_prune():
            return False
        trial.set_user_attr(PRUNED_AFTER, self._validations)
        return True

    def _was_told_to_stop(self, trial: optuna.Trial) -> bool:
        """By now, or by a process that was killed before its training came to its end."""
        with naming_database(self._which.storage):
            return bool(trial.user_attrs.get(PRUNED_AFTER, math.inf) <= self._validations)


def study_reports(trial: optuna.Trial) -> dict[int, float]:
    """Step → value of what a trial has reported, in this process or before."""
    (frozen,) = (one for one in trial.study.get_trials(deepcopy=False) if one.number == trial.number)
    return frozen.intermediate_values
