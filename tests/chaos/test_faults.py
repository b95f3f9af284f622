"""What a run survives on a cluster of several machines, and what that costs.

Every run has the same configuration but for its name, so all must end with the weights, the metrics and the order of
samples of the one that nothing happened to, leave no process and no placement group, and have each metric in the
tracker once.
"""

import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import SPARE, Lab, kill, wait_until
from s3_server import BUCKET
from trial import (
    CONTROLLER,
    DRIVER,
    SUPERVISOR,
    Outcome,
    Trial,
    measure,
    order_problems,
    plain_run,
    problems,
    submit,
)

from dabnn.checkpoints import is_intact, list_checkpoints
from dabnn.run_folder import RunFolder

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

_MIDDLE = 40  # a step in mid-epoch, several checkpoints after the start

STORE = f"s3://{BUCKET}/runs"
Survives = Callable[..., Trial]


@pytest.fixture(autouse=True)
def _whole_lab(lab: Lab) -> None:
    """Every test begins with all machines on, plugged in and known to the head."""
    lab.mend()


@pytest.fixture
def survives(lab: Lab, data: Path, undisturbed: RunFolder, tell: Callable[[Outcome], None]) -> Survives:
    """Give what submits a run, does something to it, adds a row to the table, and checks how the run ends."""

    def survive(
        fault: str, act: Callable[[Trial], float | None], *changes: str, storage: Path | None = None, **expected: Any
    ) -> Trial:
        trial = submit(lab, fault.replace(" ", "-"), data, *changes, storage=storage)
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


def test_store_that_is_away_stops_nothing(lab: Lab, survives: Survives) -> None:
    def away(_: Trial) -> None:
        lab.stop_store()
        time.sleep(20)
        lab.start_store()

    fault = "the object store is away for 20 s"
    survives(fault, away, f"storage={STORE}", storage=lab.bucket / "runs", restarts=False)


def test_machine_of_rank_0_lost_with_the_run_in_the_object_store(lab: Lab, survives: Survives) -> None:
    def lose(trial: Trial) -> None:
        (name,) = [name for name in lab.machines if trial.working.root.is_relative_to(lab.machines[name].disk)]
        lab.machines[name].power_off()

    fault = "the node of rank 0, with the run in the object store, loses its power"
    survives(fault, lose, f"storage={STORE}", storage=lab.bucket / "runs")


def test_full_storage_fails_the_run_and_harms_no_checkpoint(
    lab: Lab, data: Path, undisturbed: RunFolder, tell: Callable[[Outcome], None]
) -> None:
    outside = lab.network.small_outside
    trial = submit(lab, "full", data, f"storage={lab.network.small / 'runs'}", storage=outside / "runs")
    trial.wait_for_step(_MIDDLE)
    room = list_checkpoints(trial.folder.checkpoints)[-1].num_bytes // 2
    begun, step = time.time(), trial.step
    (outside / "ballast").write_bytes(bytes(shutil.disk_usage(outside).free - room))
    wait_until(lambda: trial.status()["status"] == "failed", 120, 1.0, what="the full storage noticed")
    seen_after_s = time.time() - begun
    assert trial.status()["message"].startswith(("storage", "rank 0: storage"))
    assert all(is_intact(checkpoint) for checkpoint in list_checkpoints(trial.folder.checkpoints))
    (outside / "ballast").unlink()
    trial.resume()
    wait_until(lambda: trial.attempts == 2, 120, what="the run goes on")
    lost = max(0, step - trial.folder.attempts()[-1]["start_step"])
    remark = "room is made, then dab resume"
    tell(Outcome("the storage is full in mid-checkpoint", seen_after_s, time.time() - begun, lost, 2, remark))
    trial.finish()
    assert problems(trial, undisturbed) == []


def test_elastic_run_shrinks_with_a_lost_node_and_grows_with_a_new_one(
    lab: Lab, data: Path, undisturbed: RunFolder, tell: Callable[[Outcome], None]
) -> None:
    epochs = 60
    elastic = ("cluster.min_workers=1", "cluster.cpus_per_worker=2", f"train.epochs={epochs}")
    trial = submit(lab, "elastic", data, *elastic)
    trial.wait_for_step(_MIDDLE)
    try:
        tell(measure(trial, "elastic: a node of two is lost", lab.machines["node2"].power_off))
        assert trial.folder.attempts()[-1]["world_size"] == 1
        tell(measure(trial, "elastic: a node is added", lambda: lab.add_node(SPARE)))
        assert trial.folder.attempts()[-1]["world_size"] == 2
        trial.finish()
    finally:
        lab.remove_node(SPARE)
    assert order_problems(trial, plain_run(lab, data, "elastic", f"train.epochs={epochs}")) == []
