"""Failures of real runs: what is started again without being asked, what is told of it, that nothing is left over."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from program import ROOT, Dab, finish, has_checkpoint, kill, processes_of, wait_until

from dabnn.distributed import World
from dabnn.run_folder import RunFolder
from dabnn.train import train
from orchestrator.config import Config
from orchestrator.resolve import train_spec

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

CONFIG = ROOT / "examples" / "digits.yaml"
HERE = "cluster.num_workers=0"
LEFT = """
import json, os, ray
ray.init(os.environ["RAY_ADDRESS"], logging_level="ERROR")
from ray.util import placement_group_table
print(json.dumps([each["name"] for each in placement_group_table().values() if each["state"] != "REMOVED"]))
"""


def begun(dab: Dab, digits: Path, name: str, *changes: str) -> str:
    """Submit a narrow network on the digits, wait for a checkpoint in mid-epoch and return the run's id."""
    values = [
        f"name={name}", f"data.train={digits}", "data.batch_size=32", "model.width=0.0625", "train.epochs=2",
        "train.checkpoint.every_steps=10", *changes,
    ]  # fmt: skip
    run_id = dab.ok("submit", CONFIG, *(part for value in values for part in ("--set", value)), "--detach")["run_id"]
    wait_until(lambda: has_checkpoint(dab.folder(run_id), 10), 300)
    return str(run_id)


def undisturbed(folder: RunFolder, place: Path) -> str:
    """Train the run of a folder again, here and on one rank, and return the digest of its weights."""
    job = json.loads((folder.root / "job.json").read_text())
    spec = train_spec(Config.model_validate_json(json.dumps(job["config"])))
    return train(spec, RunFolder(place), world=World.current()).weights_sha256


def events(dab: Dab, run_id: str) -> list[tuple[str, str | None]]:
    """Return what is noted of a run, and what was done about it."""
    return [(event["what"], event.get("action")) for event in dab.folder(run_id).events()]


@dataclass(frozen=True)
class Over:
    """A run that is over."""

    run_id: str
    status: dict[str, Any]


@pytest.fixture(scope="module")
def lost(dab: Dab, digits: Path) -> Over:
    """A run that trains in the job's own process, which is killed in mid-epoch."""
    run_id = begun(dab, digits, "driverless", HERE)
    kill(processes_of(run_id, "-m jobs.train")[0])
    wait_until(lambda: dab.folder(run_id).result(), 300)
    return Over(run_id, wait_until(lambda: (now := dab.ok("status", run_id))["status"] != "running" and now))


def test_a_lost_driver_is_started_again_and_ends_with_the_weights_of_an_undisturbed_run(
    dab: Dab, lost: Over, tmp_path: Path
) -> None:
    assert (lost.status["status"], lost.status["attempts"]) == ("finished", 2)
    assert events(dab, lost.run_id) == [("submitted", None), ("driver lost", "retry")]
    assert lost.status["weights_sha256"] == undisturbed(dab.folder(lost.run_id), tmp_path)


def test_status_and_log_tell_what_happened_in_words(dab: Dab, lost: Over) -> None:
    told = "its driver died (SIGKILL); it goes on from the last checkpoint (restart 1 of 3)"
    story = [line[20:] for line in lost.status["story"]]
    assert story[0] == "submitted"
    assert story[1] == "attempt 1 began at step 0 with 1 worker"
    assert story[2].startswith("the program that drives the run was lost at step ")
    assert story[2].endswith(told)
    assert story[3].startswith("attempt 2 began at step ")
    assert told in dab.ok("logs", lost.run_id)["text"]


def test_a_second_stop_and_an_edited_configuration_are_refused_in_words(dab: Dab, digits: Path) -> None:
    run_id = begun(dab, digits, "twice", HERE, "train.epochs=5000")
    (driver,) = processes_of(run_id, "-m jobs.train")
    driver.suspend()
    stopping = dab.start("stop", run_id)
    wait_until(dab.folder(run_id).is_stop_requested)
    again = dab("stop", run_id)
    driver.resume()
    assert finish(stopping).code == 0
    assert again.code == 2
    assert again.message.startswith("twice: is being stopped already, since ")
    assert again.message.endswith(f"`dab stop {run_id[:8]} --now` ends it without one.")
    written = dab.folder(run_id).root / "config.yaml"
    written.write_text(written.read_text().replace("epochs: 5000", "epochs: 6000"))
    refused = dab("resume", run_id)
    assert refused.code == 2
    assert refused.message.startswith(f"{written}: was changed since the run began (train.epochs: 6000, the run began")


@pytest.mark.slow
def test_a_frozen_worker_is_noticed_told_with_the_stacks_of_the_others_and_replaced(dab: Dab, digits: Path) -> None:
    run_id = begun(dab, digits, "frozen", "cluster.hang_s=15", "train.epochs=5000")
    frozen = processes_of(run_id, "ray::RayTrainWorker")[-1]
    frozen.suspend()
    folder = dab.folder(run_id)
    wait_until(lambda: len(folder.attempts()) == 2, 300)
    wait_until(lambda: not frozen.is_running() or frozen.status() == psutil.STATUS_ZOMBIE)
    assert events(dab, run_id) == [("submitted", None), ("hang", "retry")]
    why = folder.events()[-1]["why"]
    assert "took no step for" in why
    assert "it does not answer: its process is frozen" in why
    (stacks,) = (folder.root / "stacks").iterdir()
    assert "all_reduce" in stacks.read_text()
    end_and_find_nothing(dab, run_id, "--now")


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_saves_its_step_and_that_is_no_failure(dab: Dab, digits: Path) -> None:
    run_id = begun(dab, digits, "told", "train.epochs=5000", "cluster.max_failures=0")
    folder = dab.folder(run_id)
    processes_of(run_id, "ray::RayTrainWorker")[0].terminate()
    wait_until(lambda: len(folder.attempts()) == 2, 300)
    assert events(dab, run_id)[1:] == [("notice", "a checkpoint is taken"), ("preempted", "retry")]
    assert folder.attempts()[1]["start_step"] == folder.events()[-1]["step"]
    end_and_find_nothing(dab, run_id)


@pytest.mark.slow
def test_nothing_is_left_of_a_run_whose_driver_was_lost_for_good(dab: Dab, digits: Path) -> None:
    run_id = begun(dab, digits, "gone", "train.epochs=5000", "cluster.max_failures=0")
    kill(processes_of(run_id, "-m jobs.train")[0])
    wait_until(lambda: dab.folder(run_id).result(), 60)
    find_nothing(dab, run_id)
    assert dab.ok("status", run_id)["status"] == "failed"


def end_and_find_nothing(dab: Dab, run_id: str, *options: str) -> None:
    """Stop a run, and look for what is left of it."""
    dab.ok("stop", run_id, *options)
    find_nothing(dab, run_id)


def find_nothing(dab: Dab, run_id: str) -> None:
    """Wait until neither a process of a run nor a placement group is left."""
    wait_until(lambda: not processes_of(run_id, ""), 120)
    assert placement_groups(dab) == []


def placement_groups(dab: Dab) -> list[str]:
    """Ask the cluster for placement groups that hold resources."""
    cluster = dab.ok("cluster", "up")
    environment = os.environ | {
        "RAY_ADDRESS": cluster["address"], "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster["token_path"],
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", LEFT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))
