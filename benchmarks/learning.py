"""What each way of binarizing learns: arms of one configuration, several seeds each, trained alike, as one table.

    PYTHONPATH=. python benchmarks/learning.py benchmarks/learning_omniglot.yaml --data DATASET --work FOLDER

An arm is a set of overrides of the configuration; a run is `python -m dabnn.train` in a process of its own with one
thread, `--processes` of them at a time. A run that has finished in `--work` is not repeated, so an interrupted call
goes on where it was. The table gives the last epoch's accuracy, not the best: the best of many epochs is optimistic.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packed_conv import record

from dabnn.data import load_manifest
from orchestrator.config import load_config, resolve_paths
from orchestrator.resolve import resolve, train_spec

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: Name of the arm.
        seed: Decides weights, order and augmentation.
        folder: Where it leaves specification, metrics and result.
    """

    arm: str
    seed: int
    folder: Path


def prepare(config: Path, overrides: Sequence[str], run: Run) -> None:
    """Writes the specification of a run into its folder, unless it has begun already."""
    run.folder.mkdir(parents=True, exist_ok=True)
    spec = train_spec(resolve(resolve_paths(load_config(config, [*overrides, f"seed={run.seed}"])))).to_dict()
    path = run.folder / "spec.json"
    text = json.dumps(spec, indent=2)
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{path}: belongs to another configuration. Name another --work, or remove it.")
    path.write_text(text)


def train(run: Run) -> dict[str, Any]:
    """Trains a run to its end, or reads the result that it left, and returns the metrics of its last epoch."""
    result_path = run.folder / "result.json"
    if not result_path.exists():
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "dabnn.train", str(run.folder / "spec.json"), str(run.folder)]
        with (run.folder / "log.txt").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    result: dict[str, Any] = json.loads(result_path.read_text()) if result_path.exists() else {"status": "failed"}
    if result["status"] != "finished":
        raise SystemExit(f"{run.folder}: did not finish, see its log.txt")
    metrics = result["metrics"]
    print(f"{run.arm} seed {run.seed}: val_top1 {metrics['val_top1']:.2f}", file=sys.stderr, flush=True)
    return {"arm": run.arm, "seed": run.seed} | {
        name: round(metrics[name], 4) for name in ("val_top1", "val_loss", "train_top1", "train_loss")
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row an arm: mean and sample standard deviation over its seeds."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        top1 = [row["val_top1"] for row in own]
        table.append(
            {
                "arm": arm,
                "val_top1": statistics.mean(top1),
                "spread": statistics.stdev(top1) if len(top1) > 1 else 0.0,
                "train_top1": statistics.mean(row["train_top1"] for row in own),
                "train_loss": statistics.mean(row["train_loss"] for row in own),
                "seeds": len(own),
            }
        )
    return table


def main() -> None:
    """Trains what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", type=Path, help="YAML: {config: FILE, arms: {name: [KEY=VALUE, ...]}}")
    parser.add_argument("--data", type=Path, required=True, help="folder that `dab data build` wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", help="arms to train; all if left out")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    plan = yaml.safe_load(arguments.arms.read_text())
    arms = {arm: plan["arms"][arm] for arm in arguments.only or plan["arms"]}
    # Seeds outermost: an interrupted table has whole rows of fewer seeds rather than fewer arms.
    runs = [Run(arm, seed, arguments.work / f"{arm}-{seed}") for seed in arguments.seeds for arm in arms]
    for run in runs:
        prepare(ROOT / plan["config"], [f"data.train={arguments.data.resolve()}", *arms[run.arm]], run)
    with ThreadPoolExecutor(arguments.processes) as pool:
        rows = list(pool.map(train, runs))
    manifest = load_manifest(arguments.data)
    record(
        arguments.arms.stem,
        summary(rows),
        config=plan["config"],
        arms=arms,
        data_digest=manifest.digest,
        runs=rows,
    )


if __name__ == "__main__":
    main()
