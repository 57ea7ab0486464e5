"""What a sweep found: ``table.csv``, the best trials in print, and ``importances.png``."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from gitlight.disk import writing
from gitlight.sweep.running import log_path, state_name
from gitlight.sweep.specification import Specification
from gitlight.sweep.study import EXIT_CODE, GIVEN_UP, REASON, best_value, by_place

FEWEST_TRIALS = 10
"""Finished and pruned trials below which importances would be chance."""

SHOWN = 10
"""Trials in the printed table."""

_IN_THE_TOP = 5
"""Trials at least that PED-ANOVA contrasts with the others, as Optuna's documentation advises."""


def write_report(specification: Specification, study: optuna.Study, folder: Path) -> str:
    """Write the files and return what to print.

    Args:
        specification: the sweep.
        study: its study.
        folder: where ``table.csv`` and ``importances.png`` go.
    """
    trials = by_place(study.get_trials(deepcopy=False))
    write_table(specification, trials, folder)
    failed = [place for place, trial in trials.items() if trial.state == TrialState.FAIL]
    lines = [best_trials(specification, trials), ""]
    lines += [
        f"trial {place} failed: {trials[place].user_attrs.get(REASON, GIVEN_UP)}; see {log_path(folder, place)}"
        for place in failed
    ]
    lines += [f"table: {folder / 'table.csv'}", draw_importances(specification, study, folder)]
    return "\n".join(lines)


def write_table(specification: Specification, trials: Mapping[int, FrozenTrial], folder: Path) -> None:
    """``table.csv``: a row for each trial, in order; the metric is the best of its validations."""
    columns = ["trial", "state", specification.metric, "validations", *specification.space, "exit_code", "reason"]
    partial = folder / ".table.csv.partial"
    with writing(folder / "table.csv"), partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for place, trial in trials.items():
            value = best_value(trial, specification.goal)
            code, reason = (trial.user_attrs.get(key) for key in (EXIT_CODE, REASON))
            parameters = [trial.params.get(name, "") for name in specification.space]
            row = [place, state_name(trial), value, len(trial.intermediate_values), *parameters, code, reason]
            writer.writerow("" if cell is None else cell for cell in row)
    partial.replace(folder / "table.csv")


def best_trials(specification: Specification, trials: Mapping[int, FrozenTrial]) -> str:
    """The best trials as a table, best first, and how many there are of each state."""
    sign = -1 if specification.goal == "maximize" else 1
    ranked: list[tuple[float, int, FrozenTrial]] = []
    for place, trial in trials.items():
        value = best_value(trial, specification.goal)
        if value is not None and trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            ranked.append((value, place, trial))
    ranked.sort(key=lambda entry: (sign * entry[0], entry[1]))
    rows = [["trial", "state", specification.metric, *specification.space]]
    for value, place, trial in ranked[:SHOWN]:
        cells = [trial.params.get(name) for name in specification.space]
        rows.append([str(place), state_name(trial), f"{value:.6g}", *map(_short, cells)])
    states = [state_name(trial) for trial in trials.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none yet"
    return "\n".join([*_aligned(rows), "", f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {counts}"])


def importances(specification: Specification, study: optuna.Study) -> dict[str, float] | str:
    """How much each parameter decides whether a trial is among the best; largest first, together 1.

    PED-ANOVA (Watanabe et al. 2023, https://arxiv.org/abs/2304.10255), over finished and pruned trials, each with the
    best that its metric was: few trials of a sweep with ``early_terminate`` finish, and the others are why.

    Returns:
        Parameter → importance, or why there are none.
    """
    compared = _compared(specification, study)
    varied = [name for name, distribution in specification.space.items() if not distribution.single()]
    if len(varied) < 2:
        return f"{len(varied)} of the parameters varies, so there is nothing to compare"
    if len(compared) < FEWEST_TRIALS:
        return f"{len(compared)} trials finished or were pruned, and it takes {FEWEST_TRIALS}"
    if len({trial.value for trial in compared}) == 1:
        return f"all trials have the same {specification.metric}"
    evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, _IN_THE_TOP / len(compared)))
    # It looks at finished trials alone.
    as_if_finished = optuna.create_study(direction=study.direction)
    as_if_finished.add_trials(compared)
    return get_param_importances(as_if_finished, evaluator=evaluator, params=varied)


def _compared(specification: Specification, study: optuna.Study) -> list[FrozenTrial]:
    """The finished and pruned trials as finished ones, each with its best value."""
    trials = by_place(study.get_trials(deepcopy=False)).values()
    found = [
        (trial, best_value(trial, specification.goal))
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]
    return [
        create_trial(value=value, params=trial.params, distributions=trial.distributions)
        for trial, value in found
        if value is not None
    ]


def draw_importances(specification: Specification, study: optuna.Study, folder: Path) -> str:
    """Write ``importances.png``; returns where the picture is, or why there is none."""
    path = folder / "importances.png"
    found = importances(specification, study)
    if isinstance(found, str):
        return f"{path.name}: none: {found}."
    _draw(found, f"{specification.name}: what decides {specification.metric}", path)
    return f"importances: {path}"


def _draw(values: Mapping[str, float], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [(name, value) for name, value in values.items() if math.isfinite(value)][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(shown)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bars = axes.barh([name for name, _ in shown], [value for _, value in shown], color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("importance (PED-ANOVA), of all together 1", fontsize=9)
    axes.margins(x=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        canvas.print_png(partial)
        partial.replace(path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
