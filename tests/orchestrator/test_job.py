import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dabnn.errors import DabError, InvalidInputError
from orchestrator.config import load_config, to_dict
from orchestrator.job import VARIABLE, Job, is_job_of

CONFIG = load_config(None, ["name=$(touch x) $HOME", "model.name=bincifar", "data.train=shards"])


def job(folder: Path) -> Job:
    return Job("train", "0123456789abcdef" * 2, CONFIG.name, str(folder), "http://x", "dab", 1, to_dict(CONFIG))


def test_a_job_survives_its_file_and_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(tmp_path)
    made.save()
    assert Job.load(tmp_path) == made
    monkeypatch.setenv(VARIABLE, made.to_json())
    assert Job.from_environment() == made
    assert made.parsed_config() == CONFIG


def test_nothing_in_the_variable_is_replaced_by_another_variable(tmp_path: Path) -> None:
    text = job(tmp_path / "$HOME").to_json()
    assert os.path.expandvars(text) == text  # as Ray does with the variables of a job
    assert json.loads(text)["name"] == "$(touch x) $HOME"


def test_each_attempt_is_a_job_of_its_own_and_its_name_holds_nothing_a_user_chose(tmp_path: Path) -> None:
    first = job(tmp_path)
    second = first.next_attempt()
    assert second == replace(first, attempt=2)
    assert (first.job_id, second.job_id) == ("dab-0123456789abcdef-a1", "dab-0123456789abcdef-a2")


def test_a_folder_without_a_job_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"^{tmp_path}: no run was submitted with this folder"):
        Job.load(tmp_path)


def test_a_program_of_the_cluster_started_by_hand_says_how_it_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(DabError, match=r"^DAB_JOB is not set\. .*dab submit"):
        Job.from_environment()


def test_a_trial_has_its_sweeps_job_until_it_is_resumed(tmp_path: Path) -> None:
    sweep = job(tmp_path)
    trial = replace(sweep, run_id="0f" * 16, attempt=2)
    assert not is_job_of(sweep.job_id, trial.run_id)
    assert is_job_of(trial.job_id, trial.run_id)
    assert is_job_of(sweep.job_id, sweep.run_id)
