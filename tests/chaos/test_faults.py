"""What a run survives on a cluster of several machines, and what that costs.

Every run has the same configuration but for its name, so all must end with the weights, the metrics and the order of
samples of the one that nothing happened to.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import Lab, kill, wait_until
from trial import Outcome, Trial, longest_pause, problems, strike, submit

from dabnn.run_folder import RunFolder

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

Tell = Callable[[Outcome], None]
_MIDDLE = 120  # a step in mid-epoch, several checkpoints after the start


@pytest.fixture(autouse=True)
def _whole_lab(lab: Lab) -> None:
    """Every test begins with all machines on, plugged in and known to the head."""
    lab.mend()


def begin(lab: Lab, data: Path, name: str, *changes: str) -> Trial:
    """Submit a run and wait until it is in the middle."""
    trial = submit(lab, name, data, *changes)
    trial.wait_for_step(_MIDDLE)
    return trial


def test_run_on_several_machines_equals_one_without_a_cluster(lab: Lab, data: Path, undisturbed: RunFolder) -> None:
    trial = submit(lab, "calm", data)
    trial.finish()
    assert problems(trial, undisturbed) == []
    assert trial.attempts == 1


def test_killed_worker_costs_an_attempt(lab: Lab, data: Path, undisturbed: RunFolder, tell: Tell) -> None:
    trial = begin(lab, data, "worker")
    tell(strike(trial, "a worker is killed", lambda: kill(trial.workers()[-1])))
    trial.finish()
    assert problems(trial, undisturbed) == []


def test_killed_raylet_costs_an_attempt(lab: Lab, data: Path, undisturbed: RunFolder, tell: Tell) -> None:
    trial = begin(lab, data, "raylet")
    (raylet,) = lab.find("raylet/raylet", "node2")
    tell(strike(trial, "the raylet of a node is killed", lambda: kill(raylet)))
    trial.finish()
    assert problems(trial, undisturbed) == []


def test_node_without_power_costs_an_attempt(lab: Lab, data: Path, undisturbed: RunFolder, tell: Tell) -> None:
    trial = begin(lab, data, "power")
    tell(strike(trial, "a node loses its power", lab.machines["node2"].power_off))
    trial.finish()
    assert problems(trial, undisturbed) == []


def test_killed_driver_is_seen_and_resumed(lab: Lab, data: Path, undisturbed: RunFolder, tell: Tell) -> None:
    trial = begin(lab, data, "driver")

    def lose_driver_and_resume() -> None:
        kill(trial.driver())
        wait_until(lambda: trial.status()["status"] == "failed", 60, 1.0, what="the loss of the driver seen")
        trial.resume()

    tell(strike(trial, "the driver of the job is killed", lose_driver_and_resume, remark="dab resume"))
    trial.finish()
    assert problems(trial, undisturbed) == []


def test_killed_controller_is_survived(lab: Lab, data: Path, undisturbed: RunFolder, tell: Tell) -> None:
    trial = begin(lab, data, "controller")

    def lose_controller_and_resume() -> None:
        kill(next(process for process in trial.processes() if "ray::TrainController" in " ".join(process.cmdline())))
        wait_until(lambda: trial.status()["status"] == "failed", 60, 1.0, what="the loss of the controller seen")
        trial.resume()

    tell(strike(trial, "the controller of the job is killed", lose_controller_and_resume, remark="dab resume"))
    trial.finish()
    assert problems(trial, undisturbed) == []


def test_killed_head_is_restarted_and_the_run_resumed(lab: Lab, data: Path, undisturbed: RunFolder, tell: Tell) -> None:
    trial = begin(lab, data, "head")

    def lose_head_and_resume() -> None:
        lab.machines["head"].power_off()
        lab.mend()
        wait_until(lambda: trial.status()["status"] == "failed", 60, 1.0, what="the loss of the head seen")
        trial.resume()

    remark = "head and nodes started again by their supervisor, then dab resume"
    tell(strike(trial, "the head loses its power", lose_head_and_resume, remark=remark))
    trial.finish()
    assert problems(trial, undisturbed) == []


def test_short_cut_of_a_link_is_survived(lab: Lab, data: Path, undisturbed: RunFolder, tell: Tell) -> None:
    trial = begin(lab, data, "cut")
    number = trial.attempts

    def cut_for_a_while() -> None:
        machine = lab.machines["node2"]
        machine.unplug()
        time.sleep(30)
        machine.plug_in()

    tell(strike(trial, "the link of a node is cut for 30 s", cut_for_a_while))
    assert trial.attempts >= number
    trial.finish()
    assert problems(trial, undisturbed) == []


def test_cut_link_costs_an_attempt(lab: Lab, data: Path, undisturbed: RunFolder, tell: Tell) -> None:
    trial = begin(lab, data, "cut-for-good")
    tell(strike(trial, "the link of a node is cut for good", lab.machines["node2"].unplug))
    trial.finish()
    assert problems(trial, undisturbed) == []


def test_tracker_that_is_away_misses_nothing(lab: Lab, data: Path, undisturbed: RunFolder, tell: Tell) -> None:
    trial = begin(lab, data, "tracker")
    tell(longest_pause(trial, "the tracker is away for 60 s", lambda: lab.tracker_away(60)))
    trial.finish()
    assert problems(trial, undisturbed) == []
