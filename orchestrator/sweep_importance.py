"""How much each parameter of a sweep decides about an objective, by fANOVA over its finished trials.

Functional ANOVA (Hutter, Hoos, Leyton-Brown 2014) fits a forest to the trials and divides the variance of what it
predicts among the parameters; Optuna's implementation is used. Only parameters that every trial has count.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from orchestrator.sweep_record import SweepRecord

MIN_TRIALS = 8


def importances(record: SweepRecord) -> dict[str, float]:
    """Return, for each key, its share of the variance of the first objective, the largest first; they add up to 1.

    Empty with fewer than 8 finished trials, and where all of them are alike.
    """
    trials, aim = record.finished(), record.aims[0]
    columns = {key: [trial.values.get(key) for trial in trials] for key in record.keys}
    columns = {
        key: values
        for key, values in columns.items()
        if len(set(map(repr, values))) > 1 and all(key in trial.values for trial in trials)
    }
    scores = [trial.measures[aim.metric] for trial in trials]
    if len(trials) < MIN_TRIALS or not columns or len(set(scores)) == 1:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(values) for key, values in columns.items()}
    study = optuna.create_study()
    for index, score in enumerate(scores):
        params = {key: _coded(values, index) for key, values in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself experimental
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, max_depth=32, seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    shares = {key: float(share) for key, share in found.items() if math.isfinite(share)}
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def _coded(values: Sequence[object], index: int) -> float | str:
    """Return a value as the forest sees it: numbers as they are, by their logarithm where they span decades."""
    value = values[index]
    if not _are_numbers(values):
        return repr(value)
    number = float(value)  # type: ignore[arg-type] # all of them are numbers
    return math.log(number) if _is_wide(values) else number


def _distribution(values: Sequence[object]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not _are_numbers(values):
        return CategoricalDistribution(sorted(set(map(repr, values))))
    coded = [float(_coded(values, index)) for index in range(len(values))]
    return FloatDistribution(min(coded), max(coded))


def _are_numbers(values: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _is_wide(values: Sequence[object]) -> bool:
    numbers = [value for value in values if isinstance(value, int | float)]
    return min(numbers) > 0 and max(numbers) / min(numbers) > 10
