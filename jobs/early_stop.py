"""When a trial is ended early: Ray Tune's rules, shown each finished epoch of each trial once.

The rules live in memory, and a driver that was killed left none of it. A new driver shows them what the folders of the
trials recorded, in the order of time, and they decide on as they would have.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.config_search import Search
from orchestrator.search import grace_epochs, judged_metric

_MEDIAN_OF = 3  # trials that must have got as far before one is compared with their median


@dataclass(frozen=True)
class Epoch:
    """A finished epoch of a trial.

    Attributes:
        wall_time: When it ended, seconds since 1970.
        number: Of the trial.
        epoch: Finished epochs of the trial.
        metrics: What the trial logged.
    """

    wall_time: float
    number: int
    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class PastTrial:
    """What a rule looks at of a trial."""

    trial_id: str


class _Once:
    """Shows a rule each epoch once, and never a trial's last one: that trial is done, with its result and checkpoint.

    A trial that goes on after a failure reports its epochs from the first on.
    """

    last_epoch = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._seen: dict[str, int] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        epoch = int(result.get("epoch", 0))
        if not self._seen.get(trial.trial_id, 0) < epoch < self.last_epoch:
            return str(TrialScheduler.CONTINUE)
        self._seen[trial.trial_id] = epoch
        return str(super().on_trial_result(tune_controller, trial, result))  # type: ignore[misc]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Do nothing: the result is one that was shown before, or that of a trial without a finished epoch."""


class _Asha(_Once, ASHAScheduler):
    pass


class _Median(_Once, MedianStoppingRule):
    pass


def make_scheduler(search: Search, epochs: int) -> TrialScheduler:
    """Return Tune's scheduler over finished epochs; it ends no trial where none may be ended early.

    Args:
        search: The search.
        epochs: Of a trial.
    """
    grace, judged = grace_epochs(search, epochs), judged_metric(search)
    if search.early_stop is None or grace >= epochs or judged is None:
        return FIFOScheduler()
    by: dict[str, Any] = {"time_attr": "epoch", "metric": judged[0], "mode": judged[1], "grace_period": grace}
    made: _Asha | _Median
    if search.early_stop == "median":
        made = _Median(**by, min_samples_required=_MEDIAN_OF)
    else:
        made = _Asha(**by, max_t=epochs + 1, reduction_factor=search.reduction)
    made.last_epoch = epochs
    return made


def replay(scheduler: TrialScheduler, history: Iterable[Epoch]) -> None:
    """Show a new scheduler what trials recorded while another driver ran."""
    trials: dict[int, Any] = {}
    controller: Any = SimpleNamespace(get_live_trials=list)  # nothing else is asked of it
    for past in sorted(history, key=lambda past: past.wall_time):
        if past.number not in trials:
            trials[past.number] = PastTrial(f"past-{past.number}")
            scheduler.on_trial_add(controller, trials[past.number])
        scheduler.on_trial_result(controller, trials[past.number], past.metrics | {"epoch": past.epoch})
