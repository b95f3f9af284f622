"""Twenty kills in one run, of whatever the draw names: in the end nobody can tell.

The draw is seeded, so the same processes are killed in the same order; when exactly depends on the machine.
"""

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import Lab, kill
from trial import CONTROLLER, DRIVER, EPOCHS, SUPERVISOR, Outcome, Trial, measure, plain_run, problems, submit

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

_KILLS = 20
_FEWEST_STEPS, _MOST_STEPS = 3, 14


def _kill_worker(lab: Lab, trial: Trial, draw: random.Random) -> None:
    kill(draw.choice(trial.workers()))


def _kill_raylet(lab: Lab, trial: Trial, draw: random.Random) -> None:
    kill(lab.raylet(draw.choice(("node1", "node2"))))


def _kill_node(lab: Lab, trial: Trial, draw: random.Random) -> None:
    lab.machines[draw.choice(("node1", "node2"))].power_off()


def _kill_driver(lab: Lab, trial: Trial, draw: random.Random) -> None:
    kill(trial.one(DRIVER))


def _kill_controller(lab: Lab, trial: Trial, draw: random.Random) -> None:
    kill(trial.one(CONTROLLER))


def _kill_supervisor(lab: Lab, trial: Trial, draw: random.Random) -> float:
    return trial.lose_and_resume(lambda: kill(trial.one(SUPERVISOR)))


def _kill_tracker(lab: Lab, trial: Trial, draw: random.Random) -> None:
    lab.stop_tracker()
    time.sleep(draw.uniform(0, 10))
    lab.start_tracker()


_VICTIMS: dict[str, tuple[int, Callable[[Lab, Trial, random.Random], float | None]]] = {
    "worker": (6, _kill_worker),
    "raylet": (2, _kill_raylet),
    "node": (2, _kill_node),
    "driver": (3, _kill_driver),
    "controller": (3, _kill_controller),
    "supervisor": (2, _kill_supervisor),
    "tracker": (2, _kill_tracker),
}


def test_twenty_random_kills_change_nothing(lab: Lab, data: Path, tell: Callable[[Outcome], None]) -> None:
    lab.mend()
    epochs = f"train.epochs={3 * EPOCHS}"
    draw = random.Random(1)
    names = list(_VICTIMS)
    drawn = draw.choices(names, weights=[weight for weight, _ in _VICTIMS.values()], k=_KILLS)
    trial = submit(lab, "killed", data, epochs, f"cluster.max_failures={2 * _KILLS}")
    trial.wait_for_step(_FEWEST_STEPS)
    rows: list[Outcome] = []
    for name in drawn:
        lab.mend()
        trial.wait_for_step(trial.step + draw.randint(_FEWEST_STEPS, _MOST_STEPS))
        act = _VICTIMS[name][1]
        rows.append(measure(trial, name, lambda act=act: act(lab, trial, draw), restarts=name != "tracker"))  # type: ignore[misc]
    trial.finish()
    counted = ", ".join(f"{count} x {name}" for name, count in Counter(drawn).most_common())
    pauses = sorted(row.recovered_after_s for row in rows)
    detected = [row.detected_after_s for row in rows if row.detected_after_s is not None]
    remark = f"{counted}; recovered after {statistics.median(pauses):.1f} s in the middle, at most {pauses[-1]:.1f} s"
    lost = sum(row.steps_lost for row in rows)
    tell(Outcome(f"{_KILLS} random kills in one run", max(detected), pauses[-1], lost, trial.attempts, remark))
    assert problems(trial, plain_run(lab, data, "long", epochs)) == []
