"""Limits of a sweep that change when it is resumed, and what must not."""

import json
from pathlib import Path
from typing import Any

import pytest

from dabnn.errors import InvalidInputError
from orchestrator.config import load_config, to_dict
from orchestrator.extension import extended
from orchestrator.job import Job

SEARCH = {"space": {"optim.max_lr": {"log": [1e-4, 1e-2]}}, "num_trials": 6, "max_minutes": 2.5}


def job_of(kind: str = "sweep") -> Job:
    base = ["name=sweep", "model.name=bincifar", "model.num_classes=10", "data.train=shards"]
    config = load_config(None, [*base, f"search={json.dumps(SEARCH)}"])
    return Job(kind, "ab" * 16, "sweep", str(Path("/nowhere")), "", "dab", 1, to_dict(config))


def search_of(job: Job) -> Any:
    return job.parsed_config().search


def test_limits_are_set_or_added_to() -> None:
    job = extended(job_of(), ["search.num_trials=+20", "search.max_minutes=+0.5", "search.max_concurrent=2"])
    search = search_of(job)
    assert (search.num_trials, search.max_minutes, search.max_concurrent) == (26, 3.0, 2)
    assert search_of(extended(job_of(), ["search.num_trials=9"])).num_trials == 9
    assert extended(job_of(), []) == job_of()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("search.space.optim.max_lr={log: [1e-5, 1e-2]}", 'search.space.optim.max_lr.log: was "[0.0001, 0.01]", is'),
        ("search.algorithm=random", 'search.algorithm: was "tpe", is "random"'),
        ("seed=7", "seed: was 1, is 7"),
        ("train.epochs=3", "train.epochs: was "),
    ],
)
def test_what_trials_have_in_common_is_kept_and_the_change_is_named(change: str, expected: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        extended(job_of(), ["search.num_trials=+1", change])
    assert str(error.value).startswith(expected)
    assert "search.start_from=sweep" in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("search.max_gpu_hours=+1", "there is no number to add to"),
        ("search.num_trials=+many", "there is no number to add to"),
        ("search.num_trials=few", "search.num_trials: "),
        ("search.num_trial=3", "search.num_trial"),
    ],
)
def test_a_change_that_says_nothing_is_refused(change: str, expected: str) -> None:
    with pytest.raises(InvalidInputError, match=expected.replace(".", r"\.")):
        extended(job_of(), [change])


def test_a_run_keeps_its_configuration() -> None:
    with pytest.raises(InvalidInputError, match="is no sweep, and a run keeps its configuration"):
        extended(job_of("train"), ["train.epochs=+10"])
