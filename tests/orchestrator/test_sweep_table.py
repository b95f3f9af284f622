"""What a person sees of a sweep while it runs, from what the tracker has of its trials."""

import json
from typing import Any

import pytest

from orchestrator.config import Search, load_config
from orchestrator.sweep_table import standing
from orchestrator.tracking import RunRecord

SPACE = {"optim.max_lr": {"log": [1e-4, 1e-2]}, "schedule.name": {"choice": ["decay", "cosine"]}}


def search_of(**values: Any) -> Search:
    base = ["name=run", "model.name=bincifar", "model.num_classes=10", "data.train=shards", "train.epochs=40"]
    text = json.dumps({"space": SPACE, "num_trials": 8, "early_stop": None, **values})
    search = load_config(None, [*base, f"search={text}"]).search
    assert search is not None
    return search


def trial(number: int, status: Any, took_s: float | None = None, message: str = "", **metrics: float) -> RunRecord:
    return RunRecord(
        run_id=f"{number:032x}",
        name=f"sweep-t{number + 1:02d}",
        status=status,
        experiment="dab",
        parent="f" * 32,
        params={"optim.max_lr": f"0.00{number + 1}23456", "schedule.name": "cosine"},
        tags={"dab.trial": str(number), "dab.message": message},
        metrics=metrics,
        start_time=100.0,
        end_time=None if took_s is None else 100.0 + took_s,
        artifact_uri="",
    )


RECORDS = [
    trial(3, "running", val_top1=10.0, packed_bytes=50.0),
    trial(2, "finished", 30.0, "stopped early", val_top1=99.0, packed_bytes=10.0),
    trial(1, "finished", 50.0, val_top1=80.0, packed_bytes=90.0),
    trial(0, "finished", 40.0, val_top1=70.0, packed_bytes=40.0),
    trial(4, "queued"),
    trial(5, "failed", 0.0, "loss"),
]


def column(found: Any, title: str) -> list[object]:
    place = found.table.columns.index(title)
    return [row[place] for row in found.table.rows]


def test_the_best_trial_stands_first_and_what_runs_is_shown() -> None:
    found = standing(RECORDS, search_of())
    assert column(found, "trial")[0] == "sweep-t02"
    assert column(found, "")[:2] == ["*", ""]
    assert dict(zip(column(found, "trial"), column(found, "state"), strict=True)) == {
        "sweep-t02": "finished", "sweep-t01": "finished", "sweep-t03": "stopped early", "sweep-t04": "running",
        "sweep-t05": "queued", "sweep-t06": "failed",
    }  # fmt: skip
    assert column(found, "max_lr")[0] == "0.002235"
    assert column(found, "schedule")[0] == "cosine"


def test_the_time_left_comes_from_the_trials_that_ended() -> None:
    found = standing(RECORDS, search_of())
    assert (found.num_ended, found.num_running, found.num_trials) == (4, 1, 8)
    assert found.left_s == pytest.approx((30 + 50 + 40 + 0) / 4 * 4 / 1)
    assert found.line == "4 of 8 trials ended, 1 running, about 2 min 00 s left"
    assert standing([], search_of()).line == "0 of 8 trials ended, 0 running"


def test_with_several_objectives_the_front_is_marked() -> None:
    found = standing(RECORDS, search_of(objectives=[{"metric": "val_top1"}, {"metric": "packed_bytes"}]))
    marked = [name for star, name in zip(column(found, ""), column(found, "trial"), strict=True) if star]
    assert marked == ["sweep-t02", "sweep-t01"]
    limited = search_of(constraints=["packed_bytes <= 50"])
    found = standing(RECORDS, limited)
    assert column(found, "trial")[0] == "sweep-t01"
