"""Shared by the tests of the training loop: a small specification and a way to run it under torchrun."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from dabnn.run_folder import RunFolder
from dabnn.schedules import Schedule
from dabnn.spec import CheckpointPolicy, DataSpec, TrainSpec

ROOT = Path(__file__).resolve().parents[2]


def small_spec(data: Path, **changes: Any) -> TrainSpec:
    """A narrow fbin network on the digits at 16 pixels: about a second an epoch."""
    spec = TrainSpec(
        seed=3,
        model={"name": "bincifarfbin", "num_classes": 10, "in_channels": 1, "input_size": 16, "width": 0.0625},
        data=DataSpec(train=str(data), val=str(data), batch_size=96, eval_batch_size=128),
        schedule=Schedule(name="cosine", max_lr=3e-3, min_lr=1e-5, epochs=2),
        epochs=2,
        checkpoint=CheckpointPolicy(every_steps=4),
    )
    return replace(spec, **changes)


def start_torchrun(
    spec: TrainSpec, folder: Path, num_workers: int, location: str | None = None
) -> "subprocess.Popen[str]":
    """Start the loop on `num_workers` local ranks in a session of its own; the run is at `location`, or in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "spec.json"
    file.write_text(json.dumps(spec.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "dabnn.train", str(file), location or str(folder)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def torchrun(spec: TrainSpec, folder: Path, num_workers: int, location: str | None = None) -> dict[str, Any]:
    """Run the loop to its end on `num_workers` ranks and return its result."""
    process = start_torchrun(spec, folder, num_workers, location)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-6000:]
    return RunFolder.of(location or folder).fresh().result()


def kill_in_mid_epoch(spec: TrainSpec, folder: Path, num_workers: int) -> None:
    """Start the loop and SIGKILL all its processes once a checkpoint taken in mid-epoch is there."""
    process = start_torchrun(spec, folder, num_workers)
    commit = RunFolder(folder).checkpoints / f"step-{spec.checkpoint.every_steps:08d}.json"
    deadline = time.monotonic() + 120
    while not commit.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill(process)
    assert not RunFolder(folder).result(), "the run ended before it could be killed"


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL a launcher and all its ranks."""
    launcher = psutil.Process(process.pid)
    for member in [*launcher.children(recursive=True), launcher]:  # the ranks lead sessions of their own
        member.kill()
    process.communicate()
