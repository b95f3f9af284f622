"""What a checkpoint costs training: the steps of the real loop with and without, at about 100 MB of state.

    PYTHONPATH=. python benchmarks/checkpoint_stall_cpu.py

resnetfbin18 on digits of 32 pixels, one process, one thread. The attempts take turns: without checkpoints, with one
every ten steps in a folder, and the same with the folder behind `s3://` on a server of this machine (left out where
s3fs is missing). A step is measured from its end to the end of the next one, so that the stall of a checkpoint is all
that happens between two steps: looking for values that are not finite, the copy, the start of the thread. Beside it,
what `torch.save` and `fsync` in the training thread would take. The clock decides; on a machine that others use as well
it includes waiting for them, which the processor time of the training thread leaves out.
"""

import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from packed_conv import record

from dabnn.checkpoints import list_checkpoints, load_state
from dabnn.data import build_dataset
from dabnn.distributed import World
from dabnn.observer import LeavingError, Wish
from dabnn.run_folder import RunFolder
from dabnn.schedules import Schedule
from dabnn.spec import CheckpointPolicy, DataSpec, TrainSpec
from dabnn.train import train

sys.path.append(str(Path(__file__).parents[1] / "tests"))

STEPS, EVERY, TURNS = 55, 10, 3
MODEL = {"name": "resnetfbin18", "num_classes": 10, "in_channels": 1, "input_size": 32, "width": 0.875}
LIMIT_MS = 50.0


class Clock:
    """A watch of the loop that notes when each step ends, by the clock and by the processor time of this thread."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def alive(self, step: int) -> None:
        """Note the end of a step; the last few calls are those of the validation."""
        if step > len(self.ends):
            self.ends.append((time.perf_counter(), time.thread_time()))

    def wish(self) -> Wish:
        """Let the loop go on, and end it after enough steps."""
        return Wish.LEAVE if len(self.ends) >= STEPS else Wish.GO_ON

    def steps_ms(self) -> Iterator[tuple[int, float, float]]:
        """Yield (number, clock, processor) of each step after the fifth; what follows step n is counted with n + 1."""
        for number in range(5, len(self.ends)):
            (wall, cpu), (wall_before, cpu_before) = self.ends[number], self.ends[number - 1]
            yield number, 1e3 * (wall - wall_before), 1e3 * (cpu - cpu_before)


def attempt(spec: TrainSpec, folder: RunFolder) -> Clock:
    """Train until the clock has seen enough steps."""
    clock = Clock()
    with suppress(LeavingError):
        train(spec, folder, world=World.current(), watch=clock)
    assert len(clock.ends) >= STEPS, "the loop ended early"
    return clock


def row(kind: str, clocks: list[Clock], plain: list[Clock]) -> dict[str, Any]:
    """Return the figures of one kind of attempt; the stall is against the median step of attempts without."""
    after = [(wall, cpu) for clock in clocks for number, wall, cpu in clock.steps_ms() if number % EVERY == 0]
    others = [(wall, cpu) for clock in clocks for number, wall, cpu in clock.steps_ms() if number % EVERY]
    bare = [(wall, cpu) for clock in plain for _, wall, cpu in clock.steps_ms()]
    typical = [median(value[index] for value in bare) for index in (0, 1)]
    return {
        "checkpoints": kind,
        "step_p50_ms": median(wall for wall, _ in others + after),
        "step_max_ms": max(wall for wall, _ in others + after),
        "ratio_p50": median(wall for wall, _ in others + after) / typical[0],
        "ratio_max": max(wall for wall, _ in others + after) / max(wall for wall, _ in bare),
        "stall_p50_ms": median(wall for wall, _ in after) - typical[0],
        "stall_max_ms": max(wall for wall, _ in after) - typical[0],
        "stall_cpu_p50_ms": median(cpu for _, cpu in after) - typical[1],
        "stall_cpu_max_ms": max(cpu for _, cpu in after) - typical[1],
        "other_steps_ratio": median(wall for wall, _ in others) / typical[0],
        "other_steps_cpu_ratio": median(cpu for _, cpu in others) / typical[1],
    }


def in_the_thread(path: str, folder: Path) -> dict[str, float]:
    """Return what saving the same state in the training thread takes, the least of three."""
    state, times = load_state(path), []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.thread_time()
        with (folder / "plain.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        times.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.thread_time() - cpu)))
    return {"save_in_thread_ms": min(wall for wall, _ in times), "save_in_thread_cpu_ms": min(cpu for _, cpu in times)}


def main() -> None:
    """Print the table and write `checkpoint_stall_cpu.json`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dab-") as name, ExitStack() as stack:
        root = Path(name)
        os.environ["DAB_HOME"] = str(root / "home")
        build_dataset("builtin:digits", root / "digits")
        data = DataSpec(train=str(root / "digits"), val=str(root / "digits"), batch_size=16, eval_batch_size=128)
        schedule = Schedule(name="cosine", max_lr=1e-3, min_lr=1e-5, epochs=9)
        never = CheckpointPolicy(every_epochs=99)
        spec = TrainSpec(seed=1, model=MODEL, data=data, schedule=schedule, epochs=9, checkpoint=never)
        often = replace(spec, checkpoint=replace(never, every_steps=EVERY))
        kinds = {"none": spec, "folder": often} | ({"s3": often} if start_store(stack, root) else {})
        clocks: dict[str, list[Clock]] = {kind: [] for kind in kinds}
        for turn in range(TURNS):
            for kind, wanted in kinds.items():
                place = f"s3://bucket/{turn}" if kind == "s3" else str(root / f"{kind}-{turn}")
                clocks[kind].append(attempt(wanted, RunFolder.of(place)))
        newest = list_checkpoints(RunFolder(root / "folder-0"))[-1]
        rows = [row(kind, clocks[kind], clocks["none"]) for kind in kinds]
        again = in_the_thread(newest.path, root)
    record(
        "checkpoint_stall_cpu", rows, state_mb=newest.num_bytes / 1e6, model=MODEL, threads=1, turns=TURNS,
        every_steps=EVERY, limit_ms=LIMIT_MS, **again,
    )  # fmt: skip
    print(verdict_of(rows))


def verdict_of(rows: list[dict[str, Any]]) -> str:
    """Say whether the longest stall by the clock, of the attempts with checkpoints, is within the limit."""
    worst = max((each for each in rows if each["checkpoints"] != "none"), key=lambda each: float(each["stall_max_ms"]))
    verdict = "within" if worst["stall_max_ms"] <= LIMIT_MS else "above"
    return (
        f"longest stall: {math.ceil(worst['stall_max_ms'])} ms ({math.ceil(worst['stall_cpu_max_ms'])} ms of processor "
        f"time), {verdict} the {LIMIT_MS:.0f} ms aimed at"
    )


def start_store(stack: ExitStack, root: Path) -> bool:
    """Start an S3 server and name it in the environment; return whether s3fs is there."""
    try:
        import s3fs  # noqa: F401
    except ImportError:
        return False
    from s3_server import S3Server

    os.environ.update(stack.enter_context(S3Server(root / "s3")).environment)
    return True


if __name__ == "__main__":
    main()
