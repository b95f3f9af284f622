"""A run killed at random moments trains on each sample once an epoch, in the order of a run that nobody disturbed."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from typing import Any

import psutil
import pytest
from training import ROOT, small_spec

from dabnn.data import load_manifest
from dabnn.run_folder import RunFolder
from dabnn.spec import CheckpointPolicy, TrainSpec

SEED = 20261123
NUM_EPOCHS = 3
BATCH_SIZE = 32


class Nursery:
    """The process of `nursery.py`, which forks training processes."""

    def __init__(self) -> None:
        self._launches = count()
        # Those who are killed leave semaphores behind, of which the process that removes them would warn.
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore::UserWarning", str(Path(__file__).with_name("nursery.py"))],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def start(self, folder: Path, num_workers: int, *, own_server: bool = False) -> list[int]:
        """Start the ranks of a run; return their process ids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        request = {"folder": str(folder), "num_workers": num_workers, "port": port, "own_server": own_server}
        pids: list[int] = self._ask(request | {"launch": next(self._launches)})
        return pids

    def wait(self, pids: list[int]) -> list[int]:
        """Return how the processes ended, 0 for well, once they did."""
        codes: list[int] = self._ask({"wait": pids})
        return codes

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def spec(digits: Path) -> TrainSpec:
    spec = small_spec(digits, epochs=NUM_EPOCHS, num_workers=2, checkpoint=CheckpointPolicy(every_steps=3))
    data = replace(spec.data, batch_size=BATCH_SIZE, num_loaders=1)
    return replace(spec, data=data, schedule=replace(spec.schedule, epochs=NUM_EPOCHS), instruments=False)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: the samples of each epoch's committed steps, the epochs' digests, the weights."""

    samples: list[list[int]]
    orders: list[float]
    weights_sha256: str


def prepare(spec: TrainSpec, folder: Path) -> Path:
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(spec.to_dict()))
    return folder


def outcome(folder: Path) -> Outcome:
    """Replay what was read: of each step the reading of the last launch that began at or before it."""
    begun: dict[int, tuple[int, int]] = {}
    read: dict[tuple[int, int, int], list[int]] = {}
    for text in (folder / "samples.jsonl").read_text().splitlines():
        line = json.loads(text)
        launch, place = line["launch"], (line["epoch"], line["step"])
        begun.setdefault(launch, place)
        read.setdefault((launch, *place), []).extend(line["indices"])
    samples: list[list[int]] = [[] for _ in range(NUM_EPOCHS)]
    for epoch, step in sorted({(epoch, step) for _, epoch, step in read}):
        committed = max(launch for launch, place in begun.items() if place <= (epoch, step))
        samples[epoch] += read[committed, epoch, step]
    run = RunFolder(folder)
    orders = [line["metrics"]["sample_order"] for line in run.metrics()]
    return Outcome([sorted(epoch) for epoch in samples], orders, run.result()["weights_sha256"])


def undisturbed(nursery: Nursery, spec: TrainSpec, folder: Path, num_workers: int) -> Outcome:
    pids = nursery.start(prepare(spec, folder), num_workers)
    assert nursery.wait(pids) == [0] * num_workers, (folder / "log.txt").read_text()[-3000:]
    return outcome(folder)


@pytest.fixture(scope="module")
def expected(nursery: Nursery, spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcome]:
    """What runs on one and on two workers end with that nobody disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    return {number: undisturbed(nursery, spec, root / str(number), number) for number in (1, 2)}


def newest_step(folder: Path) -> int:
    names = [path.stem for path in RunFolder(folder).checkpoints.glob("step-*.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def kill_after(folder: Path, pids: list[int], steps: int, delay_s: float = 0.0, gap_s: float = 0.0) -> int:
    """SIGKILL the ranks in this order, some new checkpoints and a while later; return the step that they began at."""
    begun, before = time.monotonic(), newest_step(folder)
    while newest_step(folder) < before + steps:
        is_waiting = time.monotonic() < begun + 120
        if not is_waiting or any(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in pids):
            pytest.fail((folder / "log.txt").read_text()[-3000:])
        time.sleep(0.002)
    time.sleep(delay_s)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        time.sleep(gap_s)
    return before


def kill_at_random(folder: Path, pids: list[int], moment: random.Random) -> str:
    """Kill the ranks at a random moment; return when that was."""
    steps, delay_s = 3 * moment.randrange(5), moment.uniform(0, 0.08)
    if not steps:
        delay_s *= 8  # building, restoring, the first batches
    before = kill_after(folder, moment.sample(pids, len(pids)), steps, delay_s, moment.choice([0, 0.02]))
    return f"{len(pids)} workers from step {before} on: {steps} steps and {delay_s:.3f} s later"


@pytest.mark.parametrize(
    ("workers", "num_kills"), [((1,), 7), ((2,), 7), ((2, 1), 6)], ids=["one worker", "two workers", "two or one"]
)
def test_killed_at_random_moments_each_epoch_sees_each_sample_once_in_the_undisturbed_order(
    workers: tuple[int, ...],
    num_kills: int,
    nursery: Nursery,
    spec: TrainSpec,
    expected: dict[int, Outcome],
    tmp_path: Path,
) -> None:
    moment = random.Random(f"{SEED} {workers}")
    folder = prepare(spec, tmp_path / "run")
    numbers = cycle(workers)
    for kill in range(num_kills):
        pids = nursery.start(folder, next(numbers), own_server=kill % 4 == 3)
        print(f"seed {SEED}, kill {kill + 1}:", kill_at_random(folder, pids, moment))
        assert signal.SIGKILL in nursery.wait(pids), "the run ended before it could be killed"
    last = next(numbers)
    assert nursery.wait(nursery.start(folder, last)) == [0] * last, (folder / "log.txt").read_text()[-3000:]

    found = outcome(folder)
    every_sample = list(range(load_manifest(Path(spec.data.train)).splits["train"].num_samples))
    assert found.samples == [every_sample] * NUM_EPOCHS
    assert found.orders == expected[1].orders == expected[2].orders
    assert len(set(found.orders)) == NUM_EPOCHS
    if len(workers) == 1:
        assert found.weights_sha256 == expected[workers[0]].weights_sha256


def test_a_shard_missing_on_the_machine_of_one_worker_ends_all_of_them_with_its_name(
    nursery: Nursery, spec: TrainSpec, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(spec.data.train, tmp_path / "elsewhere"))
    shard = max(elsewhere.glob("train-*.tar"))
    shard.unlink()
    folder = prepare(spec, tmp_path / "run")
    other = replace(spec, data=replace(spec.data, train=str(elsewhere), val=str(elsewhere)))
    (folder / "spec-1.json").write_text(json.dumps(other.to_dict()))
    assert 0 not in nursery.wait(nursery.start(folder, 2))
    result = RunFolder(folder).result()
    assert result["status"] == "failed"
    assert result["message"].startswith(f"rank 1: {shard}: missing; ")


def test_in_mid_epoch_a_run_does_not_go_on_with_other_steps(nursery: Nursery, spec: TrainSpec, tmp_path: Path) -> None:
    folder = prepare(spec, tmp_path / "run")
    pids = nursery.start(folder, 1)
    kill_after(folder, pids, 3)
    nursery.wait(pids)
    other = replace(spec, data=replace(spec.data, batch_size=64))
    (folder / "spec.json").write_text(json.dumps(other.to_dict()))
    assert nursery.wait(nursery.start(folder, 1)) != [0]
    message = RunFolder(folder).result()["message"]
    assert message.startswith(
        "rank 0: data.batch_size: 64, but the run is in the middle of an epoch that began with 32"
    )
