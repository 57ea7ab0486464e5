import math
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sweep_files import write_sweep

from gitlight.errors import ConfigError
from gitlight.sweep.database import shown_url
from gitlight.sweep.early_termination import EarlyTermination
from gitlight.sweep.running import Runner
from gitlight.sweep.specification import Specification, load_specification
from gitlight.sweep.study import (
    FINISHED,
    PLACE,
    PRUNED_AFTER,
    REASON,
    SETTINGS,
    SPECIFICATION,
    TERMINATION,
    best_value,
    by_place,
    conclude,
    load_study,
    make_sampler,
    open_storage,
    open_study,
    place_of,
    suggest,
    trial_id,
    trial_of,
)

Open = Callable[..., tuple[Specification, optuna.Study, RDBStorage]]


@pytest.fixture
def sweep(tmp_path: Path) -> Open:
    def open_sweep(**changes: str) -> tuple[Specification, optuna.Study, RDBStorage]:
        specification = load_specification(write_sweep(tmp_path, **changes))
        storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}", shared=False)
        return specification, open_study(specification, storage), storage

    return open_sweep


def values_of(specification: Specification, study: optuna.Study, place: int) -> dict[str, object]:
    study.sampler = make_sampler(specification, place)
    return suggest(study.ask(), specification)


def test_a_study_goes_on_with_the_same_file_and_with_other_limits(sweep: Open) -> None:
    sweep()
    sweep(run_cap="9", description="words")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "bayes"}, "method: random then, bayes now"),
        ({"metric": "{name: val/ssim, goal: maximize}"}, "metric: maximize val/psnr then, maximize val/ssim now"),
        ({"parameters": "{generator.channels: {values: [32]}}"}, "parameters.generator.channels: "),
        ({"parameters": "{generator.blocks: {values: [1]}}"}, "parameters.generator.blocks: none then"),
        ({"early_terminate": "{type: hyperband, min_iter: 3}"}, "early_terminate: null then, [3, 3] now"),
        (
            {"early_terminate": "{type: hyperband, max_iter: 9, s: 1}"},
            'early_terminate: null then, {"brackets": [3], "eta": 3, "strict": false} now',
        ),
    ],
)
def test_a_changed_file_does_not_go_on_with_a_study(sweep: Open, changes: dict[str, str], named: str) -> None:
    sweep()
    with pytest.raises(ConfigError, match="undo the change, or give the changed file another name") as raised:
        sweep(**changes)
    assert named in str(raised.value)


def test_a_study_that_kept_its_early_termination_as_two_numbers_goes_on(sweep: Open) -> None:
    early = "{type: hyperband, min_iter: 2}"
    specification, study, storage = sweep(early_terminate=early)
    study.set_user_attr(TERMINATION, [2, 3])
    study.set_user_attr(SPECIFICATION, {**specification.fixed(), "early_terminate": "[2, 3]"})
    sweep(early_terminate=early)
    assert load_study(storage, study.study_name).pruner._termination == specification.early_terminate  # type: ignore[attr-defined]


def test_a_changed_config_does_not_go_on_with_a_study(sweep: Open, tmp_path: Path) -> None:
    def config(settings: str) -> dict[str, str]:
        (tmp_path / "base.yaml").write_text(settings)
        path = tmp_path / "config.yaml"
        path.write_text("base: base.yaml\ngenerator: {name: hybrid}\n")
        return {"command": f'["${{interpreter}}", "${{program}}", {path}, "${{args_no_hyphens}}"]'}

    sweep(**config("trainer: {max_epochs: 3}\n"))
    sweep(**config("trainer: {max_epochs: 3, devices: 2}\ndata: {num_workers: 1}\ngenerator: {channels: 16}\n"))
    with pytest.raises(ConfigError, match="Undo the change; or give the sweep file another name") as raised:
        sweep(**config("trainer: {max_epochs: 5}\n"))
    assert "the sweep my_sweep began (trainer.max_epochs: 3 then, 5 now)" in str(raised.value)


def test_a_sweep_from_before_its_config_was_kept_goes_on(sweep: Open, tmp_path: Path) -> None:
    specification, study, storage = sweep()
    study.set_user_attr(SETTINGS, {"seed": specification.settings["seed"], "of_another_version": "1"})
    open_study(specification, storage)
    study.set_user_attr(SETTINGS, {})
    open_study(specification, storage)


def test_reordered_parameters_do_not_go_on_with_a_study(sweep: Open) -> None:
    one, other = "seed: {values: [5, 3]}", "optimizer.name: {values: [adam, sgd]}"
    sweep(method="grid", parameters=f"{{{one}, {other}}}")
    with pytest.raises(ConfigError, match=r"order of parameters: .*seed, .*name then, .*name, .*seed now"):
        sweep(method="grid", parameters=f"{{{other}, {one}}}")


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////nowhere/at/all.db", "unknown://host/name"])
def test_a_database_that_cannot_be_opened_is_one_message(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--storage: .* cannot be opened: "):
        open_storage(url, shared=True)


def test_passwords_are_not_shown() -> None:
    assert shown_url("postgresql://me:secret@host/name") == "postgresql://me:***@host/name"


def test_a_grids_trials_are_its_combinations_in_order(sweep: Open) -> None:
    specification, study, _ = sweep(
        method="grid", parameters="{seed: {values: [5, 3]}, optimizer.name: {values: [adam, sgd]}}"
    )
    drawn = [values_of(specification, study, place) for place in range(4)]
    assert drawn == [specification.grid_point(place) for place in range(4)]


def test_random_values_depend_on_the_place_alone_and_differ(sweep: Open) -> None:
    specification, study, _ = sweep(parameters="{optimizer.learning_rate: {min: 0.5, max: 1.5}}")
    drawn = [values_of(specification, study, place)["optimizer.learning_rate"] for place in [*range(40), *range(40)]]
    assert drawn[:40] == drawn[40:]
    first = [float(str(value)) for value in drawn[:40]]
    assert len(set(first)) == 40
    assert 0.85 < sum(first) / 40 < 1.15
    assert min(first) < 0.6 < 1.4 < max(first)


def test_bayes_looks_where_results_were_good(sweep: Open) -> None:
    specification, study, _ = sweep(method="bayes", parameters="{optimizer.learning_rate: {min: 0.5, max: 1.5}}")
    errors = []
    for place in range(40):
        study.sampler = make_sampler(specification, place)
        trial = study.ask()
        rate = suggest(trial, specification)["optimizer.learning_rate"]
        errors.append(abs(rate - 0.7))
        study.tell(trial, -errors[-1])
    assert sum(errors[-15:]) < 0.5 * sum(errors[:10]) * 15 / 10


def test_values_that_a_trial_has_stay_when_it_is_taken_up_again(sweep: Open) -> None:
    specification, study, storage = sweep(parameters="{optimizer.learning_rate: {min: 0.5, max: 1.5}}")
    study.sampler = make_sampler(specification, 0)
    trial = study.ask()
    first = suggest(trial, specification)
    study.sampler = make_sampler(specification, 1)
    assert suggest(trial_of(study, storage, trial.number), specification) == first


def ask(study: optuna.Study, storage: RDBStorage) -> int:
    number = study.ask().number
    storage.set_trial_user_attr(trial_id(study, storage, number), PLACE, place_of(number, study.trials))
    return number


def finish(study: optuna.Study, storage: RDBStorage, values: list[float], exit_code: int = 0, **said: object) -> int:
    number = ask(study, storage)
    trial = trial_of(study, storage, number)
    for step, value in enumerate(values, 1):
        trial.report(value, step)
    for key, value in said.items():
        trial.set_user_attr(key, value)
    conclude(study, storage, number, "val/psnr", exit_code)
    return number


def test_the_value_of_a_trial_is_the_best_of_its_validations(sweep: Open) -> None:
    _, study, storage = sweep()
    number = finish(study, storage, [1.0, 3.0, math.nan, 2.0], **{FINISHED: True})
    assert study.trials[number].state == TrialState.COMPLETE
    assert study.trials[number].value == 3.0
    assert best_value(study.trials[number], "minimize") == 1.0


@pytest.mark.parametrize(
    ("values", "exit_code", "said", "state", "reason"),
    [
        ([1.0], 0, {FINISHED: True, PRUNED_AFTER: 1}, TrialState.PRUNED, None),
        ([1.0], 2, {}, TrialState.FAIL, "exit code 2"),
        ([1.0], -9, {}, TrialState.FAIL, "exit code -9"),
        ([1.0], 0, {}, TrialState.FAIL, "ended before its training did"),
        ([math.nan, math.inf], 0, {FINISHED: True}, TrialState.FAIL, "val/psnr was never a finite number"),
        ([], 0, {FINISHED: True}, TrialState.FAIL, "val/psnr was never a finite number"),
    ],
)
def test_how_a_trial_ended_is_what_its_process_said(
    sweep: Open, values: list[float], exit_code: int, said: dict[str, object], state: TrialState, reason: str | None
) -> None:
    _, study, storage = sweep()
    number = finish(study, storage, values, exit_code, **said)
    assert study.trials[number].state == state
    assert study.trials[number].user_attrs.get(REASON) == reason


def test_the_retry_of_a_lost_trial_has_its_place(sweep: Open) -> None:
    _, study, storage = sweep()
    numbers = [ask(study, storage) for _ in range(3)]
    study.tell(numbers[1], state=TrialState.FAIL)
    again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
    again(study, study.trials[numbers[1]])
    retry, new = ask(study, storage), ask(study, storage)
    assert (place_of(retry, study.trials), place_of(new, study.trials)) == (1, 3)
    assert {place: trial.number for place, trial in by_place(study.trials).items()} == {0: 0, 1: retry, 2: 2, 3: new}


def test_the_trial_of_a_machine_that_falls_silent_is_run_by_another(tmp_path: Path) -> None:
    specification = load_specification(
        write_sweep(tmp_path, parameters="{optimizer.learning_rate: {min: 0.5, max: 1.5}}")
    )

    def machine() -> Runner:
        storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}", shared=True)
        return Runner(specification, open_study(specification, storage), storage, tmp_path, n_trials=2, shared=True)

    silent, alive = machine(), machine()
    lost, own = silent._next(), alive._next()
    assert lost is not None
    assert own is not None
    assert (lost.place, own.place) == (0, 1)
    assert alive._next() is None  # while the first one may be alive
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute(
            "UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00' WHERE trial_id = "
            "(SELECT trial_id FROM trials WHERE number = ?)",
            [lost.number],
        )
    retry = alive._next()
    assert retry is not None
    assert (retry.place, retry.values, retry.again) == (lost.place, lost.values, True)
    assert retry.number not in (lost.number, own.number)
    assert alive._next() is None
    # The silent one comes back: its trial is not its any more.
    ended = conclude(silent._study, silent._storage, lost.number, "val/psnr", exit_code=0)
    assert ended.state == TrialState.FAIL


def test_bad_trials_are_pruned_by_the_pruner_that_a_trials_process_loads(sweep: Open) -> None:
    specification, study, storage = sweep(early_terminate="{type: hyperband, min_iter: 2, eta: 3}")
    assert specification.early_terminate == EarlyTermination.upwards(2, 3)
    loaded = load_study(storage, study.study_name)
    verdicts = []
    for value in (10.0, 9.0, 8.0, 11.0):
        trial = trial_of(loaded, storage, ask(study, storage))
        trial.report(value, 1)
        assert not trial.should_prune()  # before its first bracket
        trial.report(value, 2)
        verdicts.append(trial.should_prune())
        study.tell(trial.number, state=TrialState.PRUNED)
    assert verdicts == [False, True, True, False]
