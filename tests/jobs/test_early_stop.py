"""Who ends trials early: shown the past of other drivers, each epoch once, and never the last epoch of a trial."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from jobs.early_stop import Epoch, PastTrial, make_scheduler, replay
from orchestrator.config import Search, load_config

CONTROLLER: Any = SimpleNamespace(get_live_trials=list)
SPACE = {"optim.max_lr": {"float": [0.1, 0.2]}}


def search_of(**values: Any) -> Search:
    base = ["name=run", "model.name=bincifar", "model.num_classes=10", "data.train=shards", "train.epochs=40"]
    search = load_config(None, [*base, f"search={json.dumps({'space': SPACE, **values})}"]).search
    assert search is not None
    return search


def decisions(scheduler: Any, curves: dict[str, list[float]]) -> dict[str, int]:
    """Show trials one after the other; return the epoch after which each was ended, 0 for none."""
    ended = {}
    for name, curve in curves.items():
        trial: Any = PastTrial(name)
        scheduler.on_trial_add(CONTROLLER, trial)
        ended[name] = 0
        for epoch, value in enumerate(curve, 1):
            if scheduler.on_trial_result(CONTROLLER, trial, {"epoch": epoch, "val_top1": value}) == "STOP":
                ended[name] = epoch
                break
    return ended


def curve(top: float, epochs: int = 12) -> list[float]:
    return [top * epoch / epochs for epoch in range(1, epochs + 1)]


CURVES = {f"t{number}": curve(top) for number, top in enumerate([50, 80, 20, 90, 60, 10, 70, 85])}


def test_the_rules_are_those_of_tune_with_our_times() -> None:
    asha = make_scheduler(search_of(grace_epochs=4, reduction=3), 40)
    assert isinstance(asha, ASHAScheduler)
    assert [rung[0] for rung in asha._brackets[0]._rungs] == [36, 12, 4]
    objectives = [{"metric": "packed_bytes"}, {"metric": "val_loss"}]
    median = make_scheduler(search_of(early_stop="median", objectives=objectives), 40)
    assert isinstance(median, MedianStoppingRule)
    assert (median._metric, median._worst, median._grace_period) == ("val_loss", float("inf"), 10)


@pytest.mark.parametrize(("values", "epochs"), [({"early_stop": None}, 40), ({}, 3), ({}, 1)])
def test_trials_that_shall_end_or_are_too_short_to_judge_are_not_stopped(values: dict[str, Any], epochs: int) -> None:
    assert type(make_scheduler(search_of(**values), epochs)) is FIFOScheduler


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_rule_that_was_shown_the_past_decides_as_one_that_lived_through_it(rule: str) -> None:
    search = search_of(early_stop=rule, grace_epochs=3)
    undisturbed = decisions(make_scheduler(search, 12), CURVES)
    assert any(undisturbed.values())
    for killed_after in range(len(CURVES)):
        first = make_scheduler(search, 12)
        names = list(CURVES)
        before = decisions(first, {name: CURVES[name] for name in names[:killed_after]})
        second = make_scheduler(search, 12)
        replay(second, past(before))
        after = decisions(second, {name: CURVES[name] for name in names[killed_after:]})
        assert before | after == undisturbed


def past(ended: dict[str, int]) -> list[Epoch]:
    """What the folders of these trials hold, told in another order."""
    history = []
    for number, (name, last) in enumerate(ended.items()):
        values = CURVES[name][: last or None]
        history += [Epoch(100.0 * number + epoch, number, epoch, {"val_top1": value})
                    for epoch, value in enumerate(values, 1)]  # fmt: skip
    return history[::-1]


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_an_epoch_that_a_restarted_trial_reports_again_counts_once(rule: str) -> None:
    search = search_of(early_stop=rule, grace_epochs=3)
    scheduler, other = make_scheduler(search, 12), make_scheduler(search, 12)
    found = {}
    for name, values in CURVES.items():
        trial: Any = PastTrial(name)
        scheduler.on_trial_add(CONTROLLER, trial)
        found[name] = 0
        for epoch in [1, 2, 1, 2, *range(3, 13)]:
            result = {"epoch": epoch, "val_top1": values[epoch - 1]}
            if scheduler.on_trial_result(CONTROLLER, trial, result) == "STOP":
                found[name] = epoch
                break
    assert found == decisions(other, CURVES)


def test_a_trial_in_its_last_epoch_is_done_and_not_ended_early() -> None:
    scheduler = make_scheduler(search_of(grace_epochs=3, reduction=2), 12)  # 12 is a rung
    assert decisions(scheduler, {"a": curve(90), "b": [*curve(90)[:11], 0.0]}) == {"a": 0, "b": 0}


def test_a_trial_without_a_finished_epoch_disturbs_no_rule() -> None:
    for rule in ("asha", "median"):
        scheduler = make_scheduler(search_of(early_stop=rule, grace_epochs=3), 12)
        empty: Any = PastTrial("empty")
        scheduler.on_trial_add(CONTROLLER, empty)
        scheduler.on_trial_complete(CONTROLLER, empty, {})
        decisions(scheduler, CURVES)
