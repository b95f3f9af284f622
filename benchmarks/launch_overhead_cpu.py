"""What the cluster costs a run: until its first step, and in each step, beside plain torchrun of the same loop.

    PYTHONPATH=. python benchmarks/launch_overhead_cpu.py

Both train the same specification with two processes on this machine: `torchrun -m dabnn.train`, and `dab submit` to an
embedded cluster that runs already and has run this code once. They take turns, so that a busy machine slows them alike;
runs that do not end with the same weights are refused. The first step of a turn is timed from the start of the command;
a step is the median over the epochs after the first, without validation, as the loop itself measures it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from packed_conv import record

from dabnn.data import build_dataset, load_manifest
from dabnn.run_folder import RunFolder
from orchestrator.config import load_config
from orchestrator.resolve import resolve, train_spec

CONFIG = Path(__file__).parents[1] / "examples" / "digits.yaml"
BIN = Path(sys.executable).parent
TURNS = int(os.environ.get("TURNS", "5"))
WORKERS, EPOCHS, BATCH = 2, 6, 128
LIMIT_S, PAUSE_S = 600, 8


def main() -> None:
    """Prints the table and writes `launch_overhead_cpu.json`."""
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        base = Path(folder)
        data = base / "digits"
        build_dataset("builtin:digits", data)
        env = os.environ | {"DAB_HOME": str(base / "home"), "OMP_NUM_THREADS": "1"}
        values = [
            f"data.train={data}", f"data.batch_size={BATCH}", f"train.epochs={EPOCHS}",
            f"cluster.num_workers={WORKERS}", "train.checkpoint.every_epochs=100",
        ]  # fmt: skip
        steps = -(-load_manifest(data).split("train").num_samples // BATCH)
        dab(env, "cluster", "up", "--num-cpus", "4")
        try:
            dab(env, "ui")
            turns = [turn(base, env, values, steps, number) for number in range(TURNS + 1)][
                1:
            ]  # the first one warms up
        finally:
            dab(env, "cluster", "down")
    rows = [
        {"way": way, **{key: median(each[way][key] for each in turns) for key in turns[0][way]}} for way in turns[0]
    ]
    ratios = {
        key: median(each["dab submit"][key] / each["torchrun"][key] for each in turns)
        for key in rows[0]
        if key != "way"
    }
    rows.append({"way": "ratio of a turn", **ratios})
    extra = median(each["dab submit"]["first_step_s"] - each["torchrun"]["first_step_s"] for each in turns)
    record(
        "launch_overhead_cpu", rows, turns=TURNS, workers=WORKERS, epochs=EPOCHS, steps_per_epoch=steps, batch=BATCH,
        extra_seconds_to_first_step=extra, all_turns=turns,
    )  # fmt: skip


def turn(base: Path, env: dict[str, str], values: list[str], steps: int, number: int) -> dict[str, dict[str, float]]:
    """Returns the figures of one run each way, the one that goes first changing from turn to turn."""
    ways = {
        "torchrun": lambda: with_torchrun(base, env, values, number),
        "dab submit": lambda: with_cluster(env, values, number),
    }
    order = list(ways) if number % 2 else list(reversed(ways))
    seen = {}
    for way in order:
        begun = time.time()
        seen[way] = figures(ways[way](), begun, steps)
        time.sleep(PAUSE_S)  # its processes end
    weights = {each.pop("weights") for each in seen.values()}
    if len(weights) > 1:
        raise RuntimeError("the two ways end with different weights, so they are not compared")
    return {way: seen[way] for way in ways}


def with_torchrun(base: Path, env: dict[str, str], values: list[str], number: int) -> RunFolder:
    """Starts plain torchrun and returns the run's folder."""
    spec, folder = base / "spec.json", RunFolder(base / f"plain-{number}")
    spec.write_text(json.dumps(train_spec(resolve(load_config(CONFIG, values), str)).to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORKERS}"]
    with (base / "torchrun.log").open("w") as log:
        subprocess.Popen([*command, "-m", "dabnn.train", str(spec), str(folder.root)], env=env, stdout=log, stderr=log)
    return folder


def with_cluster(env: dict[str, str], values: list[str], number: int) -> RunFolder:
    """Submits the run and returns its folder."""
    options = [part for value in [*values, f"name=run-{number}"] for part in ("--set", value)]
    answer = dab(env, "submit", str(CONFIG), *options, "--detach")
    return RunFolder(Path(env["DAB_HOME"]) / "storage" / answer["run_id"])


def figures(folder: RunFolder, begun: float, steps: int) -> dict[str, Any]:
    """Waits for the end of a run and returns what is compared."""
    first = wait_for(folder.progress)
    result = wait_for(folder.result)
    if result["status"] != "finished":
        raise RuntimeError(result["message"])
    lines = folder.metrics()[1:]
    return {
        "first_step_s": first["time"] - begun,
        "step_ms": 1e3 * median(line["metrics"]["epoch_s"] for line in lines) / steps,
        "epoch_s": (lines[-1]["wall_time"] - lines[0]["wall_time"]) / (len(lines) - 1),
        "weights": result["weights_sha256"],
    }


def wait_for(read: Any) -> dict[str, Any]:
    """Returns the first mapping that is not empty."""
    deadline = time.time() + LIMIT_S
    while not (found := read()):
        if time.time() > deadline:
            raise RuntimeError(f"nothing after {LIMIT_S} s")
        time.sleep(0.01)
    return dict(found)


def dab(env: dict[str, str], *arguments: str) -> Any:
    """Runs a command of the program and returns its JSON document."""
    done = subprocess.run([BIN / "dab", *arguments, "--json"], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"dab {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
