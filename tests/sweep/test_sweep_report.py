import csv
from collections.abc import Container
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from sweep_files import write_sweep

from gitlight.sweep.report import importances, write_report
from gitlight.sweep.specification import Specification, load_specification
from gitlight.sweep.study import FINISHED, PLACE, conclude, make_sampler, open_storage, open_study, suggest, trial_id

TWO = "{optimizer.learning_rate: {min: 0.5, max: 1.5}, optimizer.weight_decay: {min: 0.0, max: 1.0}}"


def run(
    folder: Path, n_trials: int, pruned: Container[int] = (2,), **changes: str
) -> tuple[Specification, optuna.Study]:
    """A sweep whose metric is at best the learning rate; the second trial fails, those at some places are pruned."""
    specification = load_specification(write_sweep(folder, **changes))
    storage = open_storage(f"sqlite:///{folder / 'study.db'}", shared=False)
    study = open_study(specification, storage)
    for place in range(n_trials):
        study.sampler = make_sampler(specification, place)
        trial = study.ask()
        storage.set_trial_user_attr(trial_id(study, storage, trial.number), PLACE, place)
        values = suggest(trial, specification)
        trial.report(values["optimizer.learning_rate"], 1)
        trial.report(0.0 if specification.goal == "maximize" else 9.0, 2)
        if place not in pruned:
            trial.set_user_attr(FINISHED, True)
            conclude(study, storage, place, specification.metric, exit_code=2 if place == 1 else 0)
        else:
            study.tell(trial, state=TrialState.PRUNED)
    return specification, study


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
def test_the_table_has_all_trials_and_the_best_come_first_in_print(tmp_path: Path, goal: str) -> None:
    specification, study = run(tmp_path, 14, parameters=TWO, metric=f"{{name: val/psnr, goal: {goal}}}")
    text = write_report(specification, study, tmp_path)
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [str(place) for place in range(14)]
    assert [row["state"] for row in rows[:4]] == ["finished", "failed", "pruned", "finished"]
    assert all(row["val/psnr"] == row["optimizer.learning_rate"] for row in rows)  # the best of two validations
    assert (rows[1]["exit_code"], rows[1]["reason"]) == ("2", "exit code 2")
    ranked = sorted(
        (row for row in rows if row["state"] != "failed"),
        key=lambda row: float(row["val/psnr"]),
        reverse=goal == "maximize",
    )
    printed = [line.split()[0] for line in text.splitlines()[1:11]]
    assert printed == [row["trial"] for row in ranked[:10]]
    assert "14 trials: 12 finished, 1 failed, 1 pruned" in text
    assert f"trial 1 failed: exit code 2; see {tmp_path / 'trial-0001.log'}" in text


def test_importances_are_drawn_and_right(tmp_path: Path) -> None:
    specification, study = run(tmp_path, 30, parameters=TWO)
    found = importances(specification, study)
    assert isinstance(found, dict)
    assert found["optimizer.learning_rate"] > 0.9  # it is the metric
    assert f"importances: {tmp_path / 'importances.png'}" in write_report(specification, study, tmp_path)
    assert (tmp_path / "importances.png").read_bytes().startswith(b"\x89PNG")


def test_pruned_trials_count_for_importances(tmp_path: Path) -> None:
    specification, study = run(tmp_path, 30, pruned=range(3, 30), parameters=TWO)
    found = importances(specification, study)
    assert isinstance(found, dict)
    assert found["optimizer.learning_rate"] > 0.9


def test_importances_are_left_out_with_a_reason(tmp_path: Path) -> None:
    specification, study = run(tmp_path, 8, parameters=TWO)
    assert "importances.png: none: 7 trials finished or were pruned, and it takes 10." in write_report(
        specification, study, tmp_path
    )


def test_one_parameter_alone_has_no_importance(tmp_path: Path) -> None:
    parameters = "{optimizer.learning_rate: {min: 0.5, max: 1.5}, seed: {value: 3}}"
    specification, study = run(tmp_path, 3, parameters=parameters)
    assert "importances.png: none: 1 of the parameters varies, so there is nothing to compare." in write_report(
        specification, study, tmp_path
    )
