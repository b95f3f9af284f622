"""What a run survives on a cluster of several machines, and what that costs.

Every run has the same configuration but for its name, so all must end with the weights, the metrics and the order of
samples of the one that nothing happened to, leave no process and no placement group, and have each metric in the
tracker once.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, kill
from trial import CONTROLLER, DRIVER, SUPERVISOR, Outcome, Trial, measure, problems, submit

from dabnn.run_folder import RunFolder

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

_MIDDLE = 100  # a step in mid-epoch, several checkpoints after the start

Survives = Callable[..., Trial]


@pytest.fixture(autouse=True)
def _whole_lab(lab: Lab) -> None:
    """Every test begins with all machines on, plugged in and known to the head."""
    lab.mend()


@pytest.fixture
def survives(lab: Lab, data: Path, undisturbed: RunFolder, tell: Callable[[Outcome], None]) -> Survives:
    """Give what submits a run, does something to it, adds a row to the table, and checks how the run ends."""

    def survive(fault: str, act: Callable[[Trial], float | None], *changes: str, **expected: Any) -> Trial:
        trial = submit(lab, fault.replace(" ", "-"), data, *changes)
        trial.wait_for_step(_MIDDLE)
        tell(measure(trial, fault, functools.partial(act, trial), **expected))
        trial.finish()
        assert problems(trial, undisturbed) == []
        return trial

    return survive


def test_run_on_several_machines_equals_one_without_a_cluster(lab: Lab, data: Path, undisturbed: RunFolder) -> None:
    trial = submit(lab, "calm", data)
    trial.finish()
    assert problems(trial, undisturbed) == []
    assert trial.attempts == 1


def test_killed_worker_costs_an_attempt(survives: Survives) -> None:
    survives("a worker is killed", lambda trial: kill(trial.workers()[-1]))


def test_killed_raylet_costs_an_attempt(lab: Lab, survives: Survives) -> None:
    survives("the raylet of a node is killed", lambda _: kill(lab.raylet("node2")))


def test_node_without_power_costs_an_attempt(lab: Lab, survives: Survives) -> None:
    survives("a node loses its power", lambda _: lab.machines["node2"].power_off())


def test_killed_driver_is_started_again(survives: Survives) -> None:
    survives("the driver of the job is killed", lambda trial: kill(trial.one(DRIVER)))


def test_killed_controller_costs_an_attempt(survives: Survives) -> None:
    survives("the controller of the workers is killed", lambda trial: kill(trial.one(CONTROLLER)))


def test_killed_job_is_seen_and_resumed(survives: Survives) -> None:
    def lose_job(trial: Trial) -> float:
        return trial.lose_and_resume(lambda: kill(trial.one(SUPERVISOR)))

    survives("the job on the head is killed", lose_job, remark="dab resume")


def test_lost_head_is_seen_and_the_run_resumed_on_the_next(lab: Lab, survives: Survives) -> None:
    def lose_head(trial: Trial) -> float:
        def act() -> None:
            lab.machines["head"].power_off()
            lab.mend()

        return trial.lose_and_resume(act)

    survives("the head loses its power", lose_head, remark="the head is started again, then dab resume")


def test_short_cut_of_a_link_is_survived(lab: Lab, survives: Survives) -> None:
    def cut(_: Trial) -> None:
        lab.machines["node2"].unplug()
        time.sleep(30)
        lab.machines["node2"].plug_in()

    survives("the link of a node is cut for 30 s", cut, restarts=None)


def test_cut_link_costs_an_attempt(lab: Lab, survives: Survives) -> None:
    survives("the link of a node is cut for good", lambda _: lab.machines["node2"].unplug())


def test_cut_link_of_the_node_with_all_workers_does_not_end_in_two_runs(lab: Lab, survives: Survives) -> None:
    def cut(trial: Trial) -> None:
        (name,) = [name for name in ("node1", "node2") if trial.workers(name)]
        lab.machines[name].unplug()

    survives("the link of the node with all workers is cut for good", cut, "cluster.placement=strict_pack")


def test_tracker_that_is_away_misses_nothing(lab: Lab, survives: Survives) -> None:
    survives("the tracker is away for 60 s", lambda _: lab.tracker_away(60), restarts=False)


def test_frozen_worker_is_a_hang_and_costs_an_attempt(survives: Survives) -> None:
    trial = survives("a worker is frozen", lambda trial: trial.workers()[-1].suspend(), "cluster.hang_s=15")
    assert any(event["what"] == "hang" for event in trial.events())


def test_node_lost_while_the_tracker_is_away(lab: Lab, survives: Survives) -> None:
    def lose_both(_: Trial) -> None:
        lab.stop_tracker()
        lab.machines["node2"].power_off()
        time.sleep(20)
        lab.start_tracker()

    survives("a node loses its power while the tracker is away", lose_both)


def test_driver_and_worker_killed_at_once(survives: Survives) -> None:
    def lose_both(trial: Trial) -> None:
        worker, driver = trial.workers()[0], trial.one(DRIVER)
        kill(worker)
        kill(driver)

    survives("a worker and the driver are killed at once", lose_both)
