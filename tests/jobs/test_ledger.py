"""The book of a sweep, on real files: what a new driver finds there, whenever the one before was killed."""

import json
from pathlib import Path
from typing import Any

import pytest

from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from jobs.ledger import LATENCY_FILE, STOPPED_EARLY, TRIAL_FILE, Ledger, trial_folder
from orchestrator.config import Config, load_config, to_dict
from orchestrator.job import Job
from orchestrator.sweep_record import SweepRecord

BASE = ["name=sweep", "model.name=bincifar", "model.num_classes=10", "data.train=shards", "train.epochs=4"]
SPACE = {"optim.max_lr": {"log": [1e-4, 1e-2]}, "binarize.bin_start": {"int": [2, 6]}}


def config_of(**search: Any) -> Config:
    return load_config(None, [*BASE, f"search={json.dumps({'space': SPACE, 'num_trials': 6, **search})}"])


def job_of(folder: Path, config: Config) -> Job:
    return Job("sweep", "ab" * 16, "sweep", str(folder), "", "dab", 1, to_dict(config))


def ledger_of(folder: Path, said: list[str] | None = None, **search: Any) -> Ledger:
    config = config_of(**search)
    assert config.search is not None
    job = job_of(folder, config)
    job.save()
    return Ledger(job, config, config.search, (said if said is not None else []).append)


def train(folder: RunFolder, top1: float, epochs: int = 4) -> None:
    for epoch in range(1, epochs + 1):
        folder.append_metrics(epoch, {"val_top1": top1 * epoch / 4, "layers/1/alpha": 0.5})


def finish(folder: RunFolder, top1: float) -> None:
    train(folder, top1)
    folder.write_result({"status": "finished", "message": ""})


def folder_of(root: Path, number: int) -> RunFolder:
    return RunFolder(root / "trials" / f"{number:04d}")


def run(ledger: Ledger, root: Path, count: int = 99) -> list[int]:
    """Do trials one after the other; return their numbers."""
    done: list[int] = []
    while len(done) < count and (point := ledger.next()) is not None:
        finish(folder_of(root, point.number), 1e4 * point.values["optim.max_lr"])
        ledger.ended(point.number)
        done.append(point.number)
    return done


def points(ledger: Ledger) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.values, trial.state) for trial in ledger.study.trials()]


def test_a_trial_is_described_in_its_folder_before_it_starts(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    point = ledger.next()
    assert point is not None
    told = folder_of(tmp_path, 0).load_json(TRIAL_FILE)
    assert (told["number"], told["name"], told["values"]) == (0, "sweep-t01", point.values)
    assert set(told["static"]) == {"packed_bytes", "bit_ops"}
    assert ledger.static_of(0) == told["static"]


def test_what_was_told_to_a_new_driver_at_any_moment_gives_the_same_sweep(tmp_path: Path) -> None:
    undisturbed = ledger_of(tmp_path / "whole")
    run(undisturbed, tmp_path / "whole")
    assert len(points(undisturbed)) == 6
    for moment in ("asked", "training", "result", "told"):
        root = tmp_path / moment
        for _ in range(3):
            ledger = ledger_of(root)
            run(ledger, root, count=1)
            point = ledger.next()
            if point is None:
                break
            folder = folder_of(root, point.number)
            if moment == "training":
                train(folder, 1e4 * point.values["optim.max_lr"], epochs=2)
            if moment in ("result", "told"):
                finish(folder, 1e4 * point.values["optim.max_lr"])
            if moment == "told":
                ledger.ended(point.number)
        last = ledger_of(root)
        run(last, root)
        assert points(last) == points(undisturbed), moment


def test_a_trial_that_did_not_end_goes_on_under_its_number(tmp_path: Path) -> None:
    first = ledger_of(tmp_path)
    point = first.next()
    assert point is not None
    folder = folder_of(tmp_path, 0)
    folder.request_stop()
    folder.write_result({"status": "stopped", "message": "stopped with the sweep"})
    first.ended(0)
    assert first.study.trials()[0].state == "running"
    again = ledger_of(tmp_path).next()
    assert again == point
    assert (folder.result(), folder.is_stop_requested()) == ({}, False)


def test_how_a_trial_ended_is_taken_down_with_its_numbers(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, objectives=[{"metric": "val_top1"}, {"metric": "latency_ms"}])
    for _ in range(4):
        ledger.next()
    train(folder_of(tmp_path, 0), 40.0, epochs=2)
    folder_of(tmp_path, 0).leave_json(LATENCY_FILE, {"latency_ms": 1.5, "place": {}})
    finish(folder_of(tmp_path, 1), 80.0)
    folder_of(tmp_path, 1).leave_json(LATENCY_FILE, {"latency_ms": 0.5, "place": {}})
    folder_of(tmp_path, 2).write_result({"status": "failed", "message": "loss is not finite"})
    errors = ["", "", "its process died", "its process died"]
    found = [ledger.ended(number, error)["message"] for number, error in enumerate(errors)]
    assert found == [STOPPED_EARLY, "", "loss is not finite", "its process died"]
    trials = ledger.study.trials()
    assert [trial.state for trial in trials] == ["pruned", "finished", "failed", "failed"]
    assert (trials[1].metrics["val_top1"], trials[1].metrics["latency_ms"]) == (80.0, 0.5)
    assert [trial.reason for trial in trials[2:]] == ["loss is not finite", "its process died"]
    record = SweepRecord.read(RunFolder(tmp_path))
    assert [trial.state for trial in record.trials] == ["stopped early", "finished", "failed", "failed"]
    assert record.trials[0].measures["latency_ms"] == 1.5


def test_a_trial_that_finished_is_not_made_a_failed_one_by_the_death_of_its_process(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    ledger.next()
    finish(folder_of(tmp_path, 0), 50.0)
    assert ledger.ended(0, "its process died")["status"] == "finished"


def test_the_run_of_a_trial_is_kept_beside_what_is_known_of_it(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    ledger.next()
    ledger.name_run(0, "cd" * 16)
    assert (ledger.run_of(0), set(ledger.static_of(0))) == ("cd" * 16, {"packed_bytes", "bit_ops"})
    assert ledger_of(tmp_path).next() is not None
    assert ledger.run_of(0) == "cd" * 16


def test_no_trial_starts_after_a_stop_or_when_a_budget_is_used_up(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "stop")
    RunFolder(tmp_path / "stop").request_stop()
    assert ledger.next() is None
    said: list[str] = []
    ledger = ledger_of(tmp_path / "time", said, max_minutes=1)
    assert len(run(ledger, tmp_path / "time", count=2)) == 2
    RunFolder(tmp_path / "time").leave_json("spent.json", {"seconds": 61.0, "gpu_seconds": 0.0})
    assert ledger_of(tmp_path / "time", said, max_minutes=1).next() is None
    assert said == ["search.max_minutes: 1 are over; no further trial starts"]


def test_a_search_without_a_point_that_keeps_its_limits_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DabError, match=r"none of \d+ points drawn from the space meets them"):
        ledger_of(tmp_path, constraints=["packed_bytes <= 10"])


def test_another_space_is_refused_and_more_trials_are_not(tmp_path: Path) -> None:
    run(ledger_of(tmp_path), tmp_path)
    more = ledger_of(tmp_path, num_trials=8)
    assert run(more, tmp_path) == [6, 7]
    with pytest.raises(InvalidInputError, match=r"search.space.optim.max_lr: was"):
        ledger_of(tmp_path, space=SPACE | {"optim.max_lr": {"log": [1e-5, 1e-2]}})


def test_the_best_points_of_an_earlier_sweep_are_tried_first(tmp_path: Path) -> None:
    first = ledger_of(tmp_path / "first")
    run(first, tmp_path / "first")
    best = first.study.trials()[first.study.front()[0]]
    second = ledger_of(tmp_path / "second", start_from=str(tmp_path / "first"))
    point = second.next()
    assert point is not None
    assert point.values == best.values


def test_trial_folders_are_found_by_number(tmp_path: Path) -> None:
    assert trial_folder(job_of(tmp_path, config_of()), 12).root == tmp_path / "trials" / "0012"
