"""When a trial is not worth going on: ``hyperband`` as W&B has it, judged from what trials have reported."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

_MOST_VALIDATIONS = 10**9
"""More than a trial has: brackets without an end are listed up to here."""

_REPEATED = "retry_history"
"""Optuna's attribute of a retry: the trials that it repeats. Its own function for it warns in every trial's log."""


@dataclass(frozen=True)
class EarlyTermination:
    """``early_terminate: {type: hyperband}``.

    Attributes:
        brackets: after how many validations a trial is judged, rising.
        eta: of those that come this far, about one in ``eta`` goes on.
        strict: whether the value at the bracket counts; otherwise the best of a trial so far.
    """

    brackets: tuple[int, ...]
    eta: int
    strict: bool = False

    @classmethod
    def upwards(cls, min_iter: int, eta: int, strict: bool = False) -> "EarlyTermination":
        """Judged after ``min_iter`` validations, and then after ``eta``, ``eta²``, … times as many.

        >>> EarlyTermination.upwards(2, 3).brackets[:4]
        (2, 6, 18, 54)
        """
        brackets = [min_iter]
        while brackets[-1] * eta <= _MOST_VALIDATIONS:
            brackets.append(brackets[-1] * eta)
        return cls(tuple(brackets), eta, strict)

    @classmethod
    def downwards(cls, max_iter: int, s: int, eta: int, strict: bool = False) -> "EarlyTermination":
        """Judged after ``max_iter`` over ``eta``, ``eta²``, …, at most ``s`` times; never after less than 1.

        >>> EarlyTermination.downwards(25, 2, 3).brackets
        (2, 8)
        """
        n_brackets = min(s, max_iter.bit_length())
        brackets = [max_iter // eta**power for power in range(n_brackets, 0, -1)]
        return cls(tuple(bracket for bracket in brackets if bracket), eta, strict)

    def kept(self) -> list[int] | dict[str, Any]:
        """For a study's attributes, and to be compared: ``[min_iter, eta]`` if that says all, as in former versions."""
        if self.brackets and self == self.upwards(self.brackets[0], self.eta):
            return [self.brackets[0], self.eta]
        return {**asdict(self), "brackets": list(self.brackets)}

    @classmethod
    def from_kept(cls, kept: list[int] | dict[str, Any]) -> "EarlyTermination":
        """What `kept` came from."""
        if isinstance(kept, list):
            min_iter, eta = kept
            return cls.upwards(min_iter, eta)
        return cls(tuple(kept["brackets"]), kept["eta"], kept["strict"])


class Hyperband(BasePruner):
    """Stops a trial that gets to a bracket where W&B would: ``hyperband_stop_runs`` of its package sweeps 0.3.0.

    Of the n trials that got there, in the order of their values there, best first, number ⌊n / eta⌋ from 0 is the
    threshold. The trial goes on unless its best value so far, or with ``strict`` its value there, is worse. Values that
    are no finite numbers do not count, not as validations either.

    Nothing is kept: a trial that is killed as it is judged is judged in the same way again. W&B's server judges every
    few minutes, and so also between brackets, by what other trials have reported since.
    """

    def __init__(self, termination: EarlyTermination) -> None:
        self._termination = termination

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial should end, by its values and those of the study's other trials."""
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        own = _history(trial, sign)
        bracket = len(own)
        if bracket not in self._termination.brackets:
            return False
        others = [_history(other, sign) for other in _counted(study) if other.number != trial.number]
        there = sorted(history[bracket - 1] for history in (own, *others) if len(history) >= bracket)
        threshold = there[len(there) // self._termination.eta]
        return (own[-1] if self._termination.strict else min(own)) > threshold


def _history(trial: FrozenTrial, sign: int) -> list[float]:
    """A trial's values in order, as far as they are finite; times ``sign``, so that less is better."""
    return [sign * value for _, value in sorted(trial.intermediate_values.items()) if math.isfinite(value)]


def _counted(study: optuna.Study) -> Iterator[FrozenTrial]:
    """All trials but those that another one repeats, which has their values, too."""
    trials = study.get_trials(deepcopy=False)
    repeated = {number for trial in trials for number in trial.system_attrs.get(_REPEATED, ())}
    return (trial for trial in trials if trial.number not in repeated)
