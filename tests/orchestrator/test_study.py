"""The study of a sweep: proposes, remembers, survives its driver; no trial is trained here."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dabnn.errors import DabError, InvalidInputError
from orchestrator.config_search import Search
from orchestrator.config_space import END, START
from orchestrator.study import Point, Study

SPACE: dict[str, Any] = {
    "optim.max_lr": {"log": [1e-4, 1e-2]},
    "optim.weight_decay": {"float": [0.0, 0.1]},
    START: {"int": [2, 7]},
    END: {"int": [2, 7]},
}
MIXED = SPACE | {
    "schedule.name": {"choice": ["decay", "step", "cosine"]},
    "schedule.interval": {"int": [5, 50]},
    "schedule.milestones": {"choice": [[20], [20, 30]]},
}
TWO = [{"metric": "val_top1", "mode": "max"}, {"metric": "packed_bytes", "mode": "min"}]
DRIVER = """
import sys
from pathlib import Path
from test_study import SPACE, open_study, run
study = open_study(Path(sys.argv[1]), algorithm=sys.argv[2], num_trials=30)
print("open", flush=True)
run(study)
"""


def open_study(path: Path, *, seed: int = 1, **search: Any) -> Study:
    options = {key: search.pop(key) for key in ("start", "static") if key in search}
    values: dict[str, Any] = {"space": SPACE, "early_stop": "none", "num_trials": 20, **search}
    return Study.open(path, Search.model_validate_json(json.dumps(values)), seed, **options)


def objective(values: dict[str, Any]) -> dict[str, float]:
    """A smooth function whose best point is a rate of 1e-3 and the layers 3 to 6."""
    rate = (math.log10(values["optim.max_lr"]) + 3) ** 2
    layers = abs(values.get(START, 3) - 3) + abs(values.get(END, 6) - 6)
    packed = 1e5 * (1 + values.get(START, 3) - values.get(END, 6) + 6)
    return {"val_top1": 90 - 10 * rate - 3 * layers, "packed_bytes": packed}


def run(study: Study, num: int = 1000) -> Study:
    """Try what was left undone, and up to `num` further points."""
    for point in study.again():
        study.tell(point.number, objective(point.values))
    for _ in range(num):
        point = study.ask()
        if point is None:
            break
        study.tell(point.number, objective(point.values))
    return study


@pytest.mark.parametrize("algorithm", ["random", "tpe", "nsga2", "gp"])
def test_an_algorithm_proposes_points_of_the_space_also_after_it_was_opened_again(
    algorithm: str, tmp_path: Path
) -> None:
    whole = run(open_study(tmp_path / "whole.jsonl", space=MIXED, algorithm=algorithm, num_trials=22))
    assert len(whole.trials()) == 22
    for num in (12, 8, 100):
        parts = run(open_study(tmp_path / "parts.jsonl", space=MIXED, algorithm=algorithm, num_trials=22), num)
    assert parts.trials() == whole.trials()
    other = run(open_study(tmp_path / "other.jsonl", space=MIXED, algorithm=algorithm, num_trials=22, seed=2), num=3)
    assert other.trials() != whole.trials()[:3]


def test_cmaes_learns_and_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = run(open_study(tmp_path / "whole.jsonl", algorithm="cmaes", num_trials=40))
    run(open_study(tmp_path / "parts.jsonl", algorithm="cmaes", num_trials=40), num=31)
    parts = run(open_study(tmp_path / "parts.jsonl", algorithm="cmaes", num_trials=40))
    assert parts.trials() == whole.trials()
    tops = [trial.metrics["val_top1"] for trial in whole.trials()]
    assert sum(tops[-10:]) > sum(tops[:10])
    assert "optimizer" not in (tmp_path / "whole.jsonl").read_text(), "a pickle must not lie in a shared folder"


@pytest.mark.parametrize("algorithm", ["random", "tpe", "nsga2", "gp"])
def test_several_objectives_give_a_front_that_nothing_dominates(algorithm: str, tmp_path: Path) -> None:
    study = run(open_study(tmp_path / "s.jsonl", algorithm=algorithm, objectives=TWO))
    goals = {trial.number: (trial.metrics["val_top1"], -trial.metrics["packed_bytes"]) for trial in study.trials()}
    front = study.front()
    assert front
    for number, own in goals.items():
        beaten = any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in goals.values())
        assert (number in front) is not beaten


def test_the_best_trial_is_the_best_of_those_that_meet_the_constraints(tmp_path: Path) -> None:
    study = run(open_study(tmp_path / "s.jsonl", constraints=["packed_bytes <= 300_000"]))
    (best,) = study.front()
    met = [trial for trial in study.trials() if trial.metrics["packed_bytes"] <= 300_000]
    assert 0 < len(met) < 20
    assert study.trials()[best].metrics["val_top1"] == max(trial.metrics["val_top1"] for trial in met)
    assert run(open_study(tmp_path / "s.jsonl", constraints=["val_top1 >= 200"])).front() == []


def test_a_point_whose_network_is_too_large_is_not_tried(tmp_path: Path) -> None:
    def static(values: dict[str, Any]) -> dict[str, float]:
        return {"packed_bytes": objective(values)["packed_bytes"]}

    limit = {"constraints": ["packed_bytes <= 300_000"]}
    for algorithm in ("tpe", "gp"):
        study = open_study(tmp_path / f"{algorithm}.jsonl", algorithm=algorithm, static=static, num_trials=13, **limit)
        assert len(run(study).trials()) == 13
        assert all(trial.metrics["packed_bytes"] <= 300_000 for trial in study.trials())
    with pytest.raises(DabError, match=r"search\.constraints: none of \d+ points .* meets them, .* packed_bytes <= 3"):
        open_study(tmp_path / "none.jsonl", static=static, constraints=["packed_bytes <= 3"]).ask()


def test_a_point_is_tried_once_and_the_study_ends_when_there_are_no_more(tmp_path: Path) -> None:
    for algorithm in ("tpe", "random", "nsga2"):
        layers = {"space": {START: {"int": [2, 4]}, END: {"int": [2, 4]}, "optim.max_lr": {"choice": [1e-3]}}}
        study = run(open_study(tmp_path / f"{algorithm}.jsonl", algorithm=algorithm, num_trials=50, **layers))
        assert sorted((t.values[START], t.values[END]) for t in study.trials()) == [
            (2, 2), (2, 3), (2, 4), (3, 3), (3, 4), (4, 4)
        ]  # fmt: skip


def test_a_grid_visits_each_point_in_order(tmp_path: Path) -> None:
    space = {"optim.max_lr": {"choice": [1e-3, 1e-2]}, START: {"int": [2, 3]}}
    run(open_study(tmp_path / "s.jsonl", algorithm="grid", space=space), num=3)
    study = run(open_study(tmp_path / "s.jsonl", algorithm="grid", space=space))
    tried = [(trial.values["optim.max_lr"], trial.values[START]) for trial in study.trials()]
    assert tried == [(1e-3, 2), (1e-3, 3), (1e-2, 2), (1e-2, 3)]


def test_points_to_start_from_come_first_and_what_they_leave_open_is_drawn(tmp_path: Path) -> None:
    start = [{"optim.max_lr": 2e-3, "optim.weight_decay": 0.05, START: 4, END: 6}, {START: 5, "seed": 3, END: 99}]
    study = run(open_study(tmp_path / "s.jsonl", start=start))
    assert study.trials()[0].values == start[0]
    assert (study.trials()[1].values[START], set(study.trials()[1].values)) == (5, set(SPACE))
    again = run(open_study(tmp_path / "t.jsonl", start=start), num=1)
    assert run(open_study(tmp_path / "t.jsonl")).trials() == study.trials()
    assert again.trials()[0].values == start[0]


def test_points_that_were_never_told_run_again_under_their_number(tmp_path: Path) -> None:
    study = open_study(tmp_path / "s.jsonl")
    first, second = study.ask(), study.ask()
    assert isinstance(first, Point)
    assert isinstance(second, Point)
    study.tell(first.number, objective(first.values))
    assert open_study(tmp_path / "s.jsonl").again() == [second]


def test_a_trial_counts_once(tmp_path: Path) -> None:
    study = open_study(tmp_path / "s.jsonl")
    assert study.ask() is not None
    study.tell(0, {"val_top1": 50.0})
    study.tell(0, {"val_top1": 99.0})
    study.tell(0, None, reason="too late")
    (trial,) = study.trials()
    assert (trial.metrics, trial.state) == ({"val_top1": 50.0}, "finished")
    with pytest.raises(DabError, match="trial 1: never asked for"):
        study.tell(1, {"val_top1": 50.0})


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"val_top1": math.nan}, "val_top1: nan is no finite number."),
        ({"val_top1": 1.0, "val_loss": math.inf}, "val_loss: inf is no finite number."),
        ({"val_top1": 1.0}, "val_loss: the trial did not log this constraint, only val_top1."),
        ({"val_loss": 1.0}, "val_top1: the trial did not log this objective, only val_loss."),
        (None, "out of memory"),
    ],
)
def test_a_trial_without_a_usable_result_failed_and_says_why(
    metrics: dict[str, float] | None, reason: str, tmp_path: Path
) -> None:
    study = open_study(tmp_path / "s.jsonl", constraints=["val_loss <= 2"])
    assert study.ask() is not None
    study.tell(0, metrics, reason="out of memory" if metrics is None else "")
    assert study.ask() is not None
    (trial, _) = open_study(tmp_path / "s.jsonl", constraints=["val_loss <= 2"]).trials()
    assert (trial.state, trial.reason) == ("failed", reason)
    assert study.front() == []


@pytest.mark.parametrize("algorithm", ["tpe", "nsga2", "gp"])
def test_trials_that_were_ended_early_count_but_are_never_the_best(algorithm: str, tmp_path: Path) -> None:
    study = open_study(tmp_path / "s.jsonl", algorithm=algorithm)
    while (point := study.ask()) is not None:
        metrics = objective(point.values) | {"epoch": 3 + point.number % 2}
        study.tell(point.number, metrics, is_pruned=bool(point.number % 3))
    states = [trial.state for trial in study.trials()]
    assert states[:4] == ["finished", "pruned", "pruned", "finished"]
    assert study.front()[0] % 3 == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 2}, "seed: was 1, is 2"),
        ({"algorithm": "random"}, 'search.algorithm: was "tpe", is "random"'),
        ({"objectives": TWO}, "search.objectives: was"),
        (
            {"space": {**SPACE, END: {"int": [2, 8]}}},
            f'search.space.{END}: was {{"int": [2, 7]}}, is {{"int": [2, 8]}}',
        ),
        ({"space": {START: SPACE[START]}}, f'search.space.{END}: was {{"int": [2, 7]}}, is not searched'),
    ],
)
def test_another_search_is_refused_and_named(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    run(open_study(tmp_path / "s.jsonl"), num=1)
    with pytest.raises(InvalidInputError) as caught:
        open_study(tmp_path / "s.jsonl", **change)
    assert expected in str(caught.value)
    assert "start a new sweep" in str(caught.value)


def test_a_study_goes_on_with_more_trials_and_other_limits(tmp_path: Path) -> None:
    run(open_study(tmp_path / "s.jsonl", num_trials=5))
    study = run(open_study(tmp_path / "s.jsonl", num_trials=8, constraints=["packed_bytes <= 1"], max_minutes=3))
    assert len(study.trials()) == 8
    assert Study.read(tmp_path / "s.jsonl").search == study.search


def test_a_study_is_read_while_its_driver_writes(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such study"):
        Study.read(tmp_path / "s.jsonl")
    study = run(open_study(tmp_path / "s.jsonl"), num=6)
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write('{"op_code": 4, "wor')
    read = Study.read(tmp_path / "s.jsonl")
    assert (read.trials(), read.front()) == (study.trials(), study.front())


def test_a_study_whose_driver_was_killed_in_mid_line_goes_on(tmp_path: Path) -> None:
    whole = run(open_study(tmp_path / "whole.jsonl"))
    run(open_study(tmp_path / "s.jsonl"), num=7)
    data = (tmp_path / "s.jsonl").read_bytes()
    (tmp_path / "s.jsonl").write_bytes(data[:-10])
    assert run(open_study(tmp_path / "s.jsonl")).trials() == whole.trials()


def test_a_study_cut_anywhere_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    whole = run(open_study(tmp_path / "whole.jsonl", algorithm="random", num_trials=3))
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for num in range(len(lines)):
        (tmp_path / "s.jsonl").write_bytes(b"".join(lines[:num]))
        cut = run(open_study(tmp_path / "s.jsonl", algorithm="random", num_trials=3))
        assert cut.trials() == whole.trials(), f"after {num} lines"


def test_killing_the_driver_again_and_again_leaves_the_trials_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole = run(open_study(tmp_path / "whole.jsonl", algorithm="random", num_trials=30))
    script = [sys.executable, "-c", DRIVER, str(tmp_path / "s.jsonl"), "random"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for attempt in range(4):
        with subprocess.Popen(script, stdout=subprocess.PIPE, env=environment) as driver:
            assert driver.stdout is not None
            driver.stdout.readline()
            time.sleep(0.02 * attempt)
            driver.kill()
    assert run(open_study(tmp_path / "s.jsonl", algorithm="random", num_trials=30)).trials() == whole.trials()
