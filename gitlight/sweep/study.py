"""The study behind a sweep: its database, how the next trial is chosen, and which trial has which place."""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from gitlight.errors import ConfigError, differences
from gitlight.sweep.database import full_disk, shown_url
from gitlight.sweep.early_termination import EarlyTermination, Hyperband
from gitlight.sweep.specification import Specification

SPECIFICATION, SETTINGS, TERMINATION, METRIC = "specification", "settings", "early_termination", "metric"
"""Attributes of a study: `Specification.fixed` and its ``settings``, what makes its pruner, what its trials report."""

PLACE, OWNER, SURPLUS = "place", "owner", "surplus"
"""Attributes of a trial that its sweep sets: `place_of`; the host and process that run it; too many by now."""

PRUNED_AFTER, FINISHED = "pruned_after", "finished"
"""Attributes of a trial that its own process sets: after how many validations; training came to its end."""

EXIT_CODE, REASON = "exit_code", "reason"
"""Attributes of a trial that failed."""

GIVEN_UP = "given up, as its machine fell silent"
"""Why a trial failed that has no reason of its own."""

HEARTBEAT_SECONDS = 30
"""How often a shared database is told that a trial is alive; silent for four times as long, it counts as dead."""

MOST_RETRIES = 3
"""How often a trial of a machine that fell silent is tried again."""

# SQLite lets one process write at a time; the others wait this many seconds.
_SQLITE_PATIENCE = 120


def quieten_optuna() -> None:
    """Of Optuna's messages, warnings alone, and none of those about choices that are made on purpose."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Heartbeats, outside Study.optimize; a sampler with fixed values.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")


def open_storage(url: str, shared: bool) -> RDBStorage:
    """The database of studies, that a user names.

    Args:
        url: SQLAlchemy's.
        shared: whether several machines use it, which heartbeats are for.

    Raises:
        ConfigError: it cannot be opened.
        OSError: it cannot be made, as the disk is full.
    """
    try:
        return connect(url, shared)
    except (SQLAlchemyError, ImportError, ValueError, RuntimeError, optuna.exceptions.StorageInternalError) as error:
        if full := full_disk(url, error):
            raise full from error
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--storage: {shown_url(url)} cannot be opened: {reason} Expected SQLAlchemy's URL of a database that is "
            "there, such as postgresql://user:password@host/name or sqlite:///file.db."
        ) from error


def connect(url: str, shared: bool) -> RDBStorage:
    """The same for a trial, whose sweep has opened it before; errors are SQLAlchemy's and Optuna's."""
    options: dict[str, Any] = {}
    template = url.replace("{", "{{").replace("}", "}}")  # Optuna fills it in
    if url.startswith("sqlite"):
        options["engine_kwargs"] = {"connect_args": {"timeout": _SQLITE_PATIENCE}}
    if shared:
        options["heartbeat_interval"] = HEARTBEAT_SECONDS
        options["grace_period"] = 4 * HEARTBEAT_SECONDS
        options["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback(
            max_retry=MOST_RETRIES, inherit_intermediate_values=True
        )
    try:
        return RDBStorage(template, **options)
    except SQLAlchemyError:
        # Two that make the tables of a new database at once are in each other's way; a second later they are there.
        time.sleep(1)
        return RDBStorage(template, **options)


def open_study(specification: Specification, storage: RDBStorage) -> optuna.Study:
    """The sweep's study, made if there is none.

    Raises:
        ConfigError: the one that is there began with another sweep file, or other settings in its config.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=specification.name,
        direction=StudyDirection[specification.goal.upper()],
        pruner=make_pruner(specification.early_terminate),
        load_if_exists=True,
    )
    now = specification.fixed()
    began = study.user_attrs.get(SPECIFICATION)
    if began is None:
        termination = specification.early_terminate
        study.set_user_attr(TERMINATION, None if termination is None else termination.kept())
        study.set_user_attr(METRIC, specification.metric)
        study.set_user_attr(SETTINGS, dict(specification.settings))
        study.set_user_attr(SPECIFICATION, now)
        return study
    # The place of a trial says which combination it has, or which random numbers are for which parameter.
    if changed := differences(began, now, "then") or differences(_order(began), _order(now), "then"):
        raise ConfigError(
            f"{specification.file} is not the file that the sweep {specification.name} began with "
            f"({changed}). A sweep goes on as it began: undo the change, or give the changed file another "
            f"name, which starts another sweep."
        )
    # None of a sweep that began before they were kept; settings come and go with versions of gitlight, too.
    former = study.user_attrs.get(SETTINGS, {})
    settings = {name: value for name, value in specification.settings.items() if name in former}
    if changed := differences({name: former[name] for name in settings}, settings, "then"):
        raise ConfigError(
            f"{specification.file}: the config of its trials is not what it was when the sweep {specification.name} "
            f"began ({changed}), and they could not be compared. Undo the change; or give the sweep file another name, "
            "which starts another sweep."
        )
    return study


def _order(fixed: Mapping[str, str]) -> dict[str, str]:
    return {"order of parameters": ", ".join(key for key in fixed if key.startswith("parameters."))}


def load_study(storage: RDBStorage, name: str) -> optuna.Study:
    """The study of a trial, in the trial's own process, with the sweep's pruner."""
    study = optuna.load_study(study_name=name, storage=storage)
    termination = study.user_attrs[TERMINATION]
    study.pruner = make_pruner(None if termination is None else EarlyTermination.from_kept(termination))
    return study


def trial_of(study: optuna.Study, storage: RDBStorage, number: int) -> optuna.Trial:
    """The running trial of a number, to suggest values or report to."""
    return optuna.Trial(study, trial_id(study, storage, number))


def trial_id(study: optuna.Study, storage: RDBStorage, number: int) -> int:
    """The database's id of a trial."""
    return storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(study.study_name), number)


def make_pruner(termination: EarlyTermination | None) -> BasePruner:
    """What stops bad trials."""
    return NopPruner() if termination is None else Hyperband(termination)


def make_sampler(specification: Specification, place: int) -> BaseSampler:
    """What chooses the values of the trial with this place, in ``range(n_trials)``.

    Seeded by the place, so that neither workers' timing nor an interruption changes what ``random`` draws. ``bayes`` is
    Optuna's TPE, which also depends on the results at that time.
    """
    seed = int(np.random.SeedSequence([0, place]).generate_state(1)[0])
    if specification.method == "grid":
        return PartialFixedSampler(specification.grid_point(place), RandomSampler(seed))
    return TPESampler(seed=seed) if specification.method == "bayes" else RandomSampler(seed)


def suggest(trial: optuna.Trial, specification: Specification) -> dict[str, Any]:
    """The trial's values; those that it has already stay."""
    values: dict[str, Any] = {}
    for name, kind in specification.space.items():
        if isinstance(kind, CategoricalDistribution):
            values[name] = trial.suggest_categorical(name, kind.choices)
        elif isinstance(kind, IntDistribution):
            values[name] = trial.suggest_int(name, kind.low, kind.high, step=kind.step, log=kind.log)
        else:
            assert isinstance(kind, FloatDistribution)
            values[name] = trial.suggest_float(name, kind.low, kind.high, step=kind.step, log=kind.log)
    return values


def place_of(number: int, trials: Sequence[FrozenTrial]) -> int:
    """The place of a trial in its sweep, from 0: how many came before it. A retry has that of the trial it repeats."""
    (trial,) = (one for one in trials if one.number == number)
    if PLACE in trial.user_attrs:
        return int(trial.user_attrs[PLACE])
    return sum(other.number < number for other in originals(trials))


def originals(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that are no retry of another, and that the sweep had a use for."""
    retried = RetryHeartbeatStaleTrialCallback.retried_trial_number
    return [trial for trial in trials if retried(trial) is None and SURPLUS not in trial.user_attrs]


def by_place(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Place → its trial, in order; of several the latest retry."""
    placed = [trial for trial in sorted(trials, key=lambda trial: trial.number) if PLACE in trial.user_attrs]
    return dict(sorted({int(trial.user_attrs[PLACE]): trial for trial in placed}.items()))


def best_value(trial: FrozenTrial, goal: str) -> float | None:
    """The best that a trial's metric was at any of its validations; None if it never was a number."""
    values = [value for value in trial.intermediate_values.values() if math.isfinite(value)]
    if not values:
        return None
    return max(values) if goal == "maximize" else min(values)


def conclude(study: optuna.Study, storage: RDBStorage, number: int, metric: str, exit_code: int) -> FrozenTrial:
    """Write down how a trial ended whose process is over.

    It is pruned or complete only if it said so itself: a command of the user's own can exit with 0 at any time.

    Args:
        study: the sweep's.
        storage: the study's.
        number: the trial's.
        metric: what is measured, for the reason of a failure.
        exit_code: its process's.
    """
    trial = study.trials[number]
    if trial.state.is_finished():
        return trial  # another machine gave it up
    value = best_value(trial, study.direction.name.lower())
    if exit_code != 0:
        return fail(study, storage, number, f"exit code {exit_code}", exit_code)
    if FINISHED not in trial.user_attrs:
        return fail(study, storage, number, "ended before its training did", exit_code)
    if value is None:
        return fail(study, storage, number, f"{metric} was never a finite number", exit_code)
    if PRUNED_AFTER in trial.user_attrs:
        return study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
    return study.tell(number, value, skip_if_finished=True)


def fail(study: optuna.Study, storage: RDBStorage, number: int, reason: str, exit_code: int | None) -> FrozenTrial:
    """Write down that a trial failed, and why."""
    identity = trial_id(study, storage, number)
    storage.set_trial_user_attr(identity, REASON, reason)
    storage.set_trial_user_attr(identity, EXIT_CODE, exit_code)
    return study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
