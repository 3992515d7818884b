"""Metrics of answers and labels, the user's own ones too, and what each row adds to one."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn import metrics

from gelora_plugins.errors import ConfigError


def parts_of(metric: Callable[[Any, Any], float], answers: Any, labels: Any) -> Any:
    """What each row adds to a score, (rows,) float64 whose mean is the score: how luck in the rows can be judged.

    Of accuracy 1 for a right answer, 0 for a wrong one. Of others by the jackknife (Efron and Stein 1981): how the
    score changes when a row is left out, times their number but one.
    """
    count, score = len(labels), metric(answers, labels)
    if metric is _accuracy:
        return (answers == labels).astype(float)
    if count == 1:  # without it there is no score
        return np.array([score])
    # A score is the same whichever of the rows with one answer and one label is left out.
    _, first, place = np.unique(np.stack([answers, labels]), axis=1, return_index=True, return_inverse=True)
    without = np.array([metric(np.delete(answers, i), np.delete(labels, i)) for i in first])[place.reshape(-1)]
    return score + (count - 1) * (without.mean() - without)


def _accuracy(answers: Any, labels: Any) -> float:
    return float(metrics.accuracy_score(labels, answers))


def _matthews(answers: Any, labels: Any) -> float:
    """0 where the answers or the labels are constant; scikit-learn 1.9 says so too, with a warning."""
    return 0.0 if _constant(answers, labels) else float(metrics.matthews_corrcoef(labels, answers))


def _f1(answers: Any, labels: Any) -> float:
    """Of label 1 of 0 and 1; 0 where no answer and no label is 1."""
    return float(metrics.f1_score(labels, answers, zero_division=0))


def _spearman(answers: Any, labels: Any) -> float:
    return 0.0 if _constant(answers, labels) else float(spearmanr(answers, labels).statistic)


def _constant(answers: Any, labels: Any) -> bool:
    return bool(np.ptp(answers) == 0 or np.ptp(labels) == 0)


SCORES: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _accuracy,
    "mcc": _matthews,
    "f1": _f1,
    "spearman": _spearman,
}


def exact_match(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where an answer is its reference, but for space around it; else 0."""
    return [float(answer.strip() == reference.strip()) for answer, reference in zip(answers, references, strict=True)]


def is_own(metric: str) -> bool:
    """Whether a metric is named as the user's own function: package.module:function."""
    return ":" in metric


def own(metric: str) -> Callable[[Any, Any], Any]:
    """The function that `metric` names. Raises ConfigError where there is none."""
    try:
        function: Callable[[Any, Any], Any] = pkgutil.resolve_name(metric)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"The metric {metric!r} cannot be imported ({type(error).__name__}: {error}). Give package.module:function "
            "of a module that Python finds from here."
        ) from error
    if not callable(function):
        raise ConfigError(f"The metric {metric!r} is {type(function).__name__}; expected a function.")
    return function


def source_of(metric: str) -> str:
    """The source of the user's own function, where Python can find it: another function is another metric."""
    try:
        return inspect.getsource(own(metric))
    except (OSError, TypeError):
        return ""
