"""The expected verdicts are those of W&B's package sweeps 0.3.0 (``stop_runs``), for runs that have just reported."""

import math

import optuna
import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState, create_trial

from gitlight.sweep.early_termination import EarlyTermination, Hyperband


def verdict(
    termination: EarlyTermination, others: list[list[float]], own: list[float], direction: str = "maximize"
) -> bool:
    study = optuna.create_study(direction=direction, pruner=Hyperband(termination))
    for values in others:
        study.add_trial(create_trial(value=0.0, intermediate_values=dict(enumerate(values, 1))))
    trial = study.ask()
    for step, value in enumerate(own, 1):
        trial.report(value, step)
    found = trial.should_prune()
    assert trial.should_prune() is found  # asked again after a kill
    return found


@pytest.mark.parametrize(
    ("others", "own", "strict", "direction", "stopped"),
    [
        ([[10, 12], [10, 13]], [30, 9], False, "maximize", False),  # its best so far counts
        ([[10, 12], [10, 13]], [30, 9], True, "maximize", True),
        ([[10, 12], [10, 13]], [11, 11], False, "maximize", True),
        ([[10, 12], [10, 13]], [12, 11], False, "maximize", False),
        ([[5, 4], [5, 3], [5, 2], [5, 1]], [5, 3], False, "minimize", True),
        ([[5, 4], [5, 3], [5, 2], [5, 1]], [5, 2.5], True, "minimize", True),
        ([[5, 4], [5, 3], [5, 2], [5, 1]], [5, 2], True, "minimize", False),
        ([[5, 4]], [5, 5], False, "minimize", True),
        ([], [5, 5], False, "minimize", False),
        ([[5, 1], [5]], [5], False, "minimize", False),  # not at a bracket yet
        ([[5, 1], [3, math.nan, 2]], [5, math.inf, 1.5], False, "minimize", False),
        ([[5, 1], [3, math.nan, 2]], [5, math.inf], False, "minimize", False),
    ],
)
def test_a_trial_is_stopped_where_wandb_stops_it(
    others: list[list[float]], own: list[float], strict: bool, direction: str, stopped: bool
) -> None:
    assert verdict(EarlyTermination.upwards(2, 3, strict), others, own, direction) is stopped


def test_nothing_is_judged_after_the_last_bracket() -> None:
    termination = EarlyTermination.downwards(max_iter=25, s=2, eta=3)
    good = [9.0] * 30
    judged = [n for n in range(1, 31) if verdict(termination, [good], [1.0] * n)]
    assert judged == [2, 8]


def test_a_trial_that_is_tried_again_counts_once() -> None:
    study = optuna.create_study(direction="maximize", pruner=Hyperband(EarlyTermination.upwards(1, 3)))
    lost = create_trial(state=TrialState.FAIL, intermediate_values={1: 5.0})
    study.add_trial(lost)
    RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, study.trials[0])
    study.ask()  # the retry
    trial = study.ask()
    trial.report(4.0, 1)
    assert trial.should_prune()  # with three values there, it would be as good as the second


@pytest.mark.parametrize(
    ("termination", "kept"),
    [
        (EarlyTermination.upwards(2, 3), [2, 3]),
        (EarlyTermination.upwards(2, 3, strict=True), None),
        (EarlyTermination.downwards(27, 2, 3), {"brackets": [3, 9], "eta": 3, "strict": False}),
    ],
)
def test_what_is_kept_says_all(termination: EarlyTermination, kept: object) -> None:
    found = termination.kept()
    assert kept is None or found == kept
    assert EarlyTermination.from_kept(found) == termination
