"""How many trials the algorithms of a search need on objectives whose best points are known; nothing is trained.

    PYTHONPATH=. python benchmarks/search_synthetic_cpu.py

The space is that of `search.preset: reference`, ten seeds.

- `trials to 5 %`: for bincifarfbin, an accuracy has its best value, 90 %, at one rate, range of layers and schedule;
  counted are the trials until 85.5 %, for TPE and random points, 401 where 400 do not get there.
- `hypervolume`: for resnetfbin18, an accuracy falls with each binary layer, and so do the bytes of the packed model;
  the share of the area under the true front (above 40 %, below the float model's bytes) after 200 trials of NSGA-II
  and of random points.
- `s a trial`: what proposing and recording takes in a study of 500, once.

A run in which the median of TPE is not below that of random points, or NSGA-II covers less than 90 %, fails.
"""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from packed_conv import record

from dabnn.models import outline
from orchestrator.config import load_config
from orchestrator.config_search import Search
from orchestrator.config_space import END, START
from orchestrator.study import Study

SEEDS = range(1, 11)
BEST, WANTED, MOST, FRONT_TRIALS = 90.0, 85.5, 400, 200
LOST_BY_SCHEDULE = {"cosine": 0.0, "one_cycle": 1.0, "linear": 1.5, "decay": 2.0, "step": 3.0, "constant": 8.0}
LEAST_TOP1 = 40.0
FRONT_MODEL = "resnetfbin18"


def lost(values: dict[str, Any]) -> float:
    """Returns what rate and schedule cost in points; none at a rate of 2e-3 with a cosine."""
    rate = 60 * (math.log10(values["optim.max_lr"]) - math.log10(2e-3)) ** 2
    interval = abs(values.get("schedule.interval", 20) - 20) / 20
    return rate + LOST_BY_SCHEDULE[values["schedule.name"]] + interval


def top1(values: dict[str, Any]) -> float:
    """Returns an accuracy that is best for the layers 3 to 6."""
    return BEST - lost(values) - 6 * abs(values[START] - 3) - 4 * abs(values[END] - 6)


def top1_of_range(start: int, end: int) -> float:
    """Returns an accuracy that falls with each binary layer, with the early ones most."""
    return BEST - sum(12 / layer for layer in range(start, end + 1))


def search_of(algorithm: str, objectives: list[dict[str, str]], num_trials: int, model: str = "bincifarfbin") -> Search:
    """Returns the search with the reference preset."""
    values = {"preset": "reference", "algorithm": algorithm, "num_trials": num_trials, "objectives": objectives}
    base = ["name=synthetic", f"model.name={model}", "data.train=none"]
    search = load_config(None, [*base, f"search={json.dumps(values | {'early_stop': 'none'})}"]).search
    assert search is not None
    return search


def trials_until_found(algorithm: str, seed: int, folder: Path) -> int:
    """Returns how many trials it takes to come within 5 % of the best value; one more than the most where it is not."""
    study = Study.open(folder / f"{algorithm}-{seed}.jsonl", search_of(algorithm, [{"metric": "val_top1"}], MOST), seed)
    while (point := study.ask()) is not None:
        value = top1(point.values)
        study.tell(point.number, {"val_top1": value})
        if value >= WANTED:
            return point.number + 1
    return MOST + 1


def hypervolume(points: list[tuple[float, float]], most_bytes: float) -> float:
    """Returns the area that (top-1, bytes) points dominate, up to `LEAST_TOP1` and `most_bytes`."""
    area, best = 0.0, LEAST_TOP1
    for value, size in sorted(points, key=lambda point: (point[1], -point[0])):
        if value > best and size < most_bytes:
            area += (value - best) * (most_bytes - size)
            best = value
    return area


def covered(algorithm: str, seed: int, sizes: dict[tuple[int, int], float], most_bytes: float, folder: Path) -> float:
    """Returns the share of the true front's hypervolume after 200 trials."""
    search = search_of(algorithm, [{"metric": "val_top1"}, {"metric": "packed_bytes"}], FRONT_TRIALS, FRONT_MODEL)
    study = Study.open(folder / f"front-{algorithm}-{seed}.jsonl", search, seed)
    while (point := study.ask()) is not None:
        start, end = point.values[START], point.values[END]
        metrics = {
            "val_top1": top1_of_range(start, end) - lost(point.values),
            "packed_bytes": sizes[start, end],
        }
        study.tell(point.number, metrics)
    trials = study.trials()
    found = [(trials[number].metrics["val_top1"], trials[number].metrics["packed_bytes"]) for number in study.front()]
    true = [(top1_of_range(*layers), size) for layers, size in sizes.items()]
    return hypervolume(found, most_bytes) / hypervolume(true, most_bytes)


def cost_s(algorithm: str, folder: Path, num_trials: int = 500) -> float:
    """Returns the seconds a trial of a study that ends with `num_trials`, without what the trial itself takes."""
    search = search_of(algorithm, [{"metric": "val_top1"}], num_trials)
    study = Study.open(folder / f"cost-{algorithm}.jsonl", search, 1)
    began = time.perf_counter()
    while (point := study.ask()) is not None:
        study.tell(point.number, {"val_top1": top1(point.values)})
    return (time.perf_counter() - began) / num_trials


def _row(figure: str, algorithm: str, values: Sequence[float]) -> dict[str, Any]:
    return {
        "figure": figure,
        "algorithm": algorithm,
        "median": median(values),
        "least": min(values),
        "most": max(values),
    }


def main() -> None:
    """Prints the figures and writes `search_synthetic_cpu.json`."""
    table = outline(FRONT_MODEL, num_classes=10)
    saved = {layer.index: layer.float_bytes - layer.packed_bytes for layer in table.layers}
    most_bytes = float(table.packed_bytes + sum(saved.values()))
    last = len(table.layers) - 1
    ranges = [(start, end) for start in range(2, last + 1) for end in range(start, last + 1)]
    sizes = {(start, end): most_bytes - sum(saved[layer] for layer in range(start, end + 1)) for start, end in ranges}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        needed = {
            algorithm: [trials_until_found(algorithm, seed, folder) for seed in SEEDS]
            for algorithm in ("tpe", "random")
        }
        shares = {
            algorithm: [covered(algorithm, seed, sizes, most_bytes, folder) for seed in SEEDS]
            for algorithm in ("nsga2", "random")
        }
        seconds = {algorithm: cost_s(algorithm, folder) for algorithm in ("random", "tpe")}
    rows = [_row("trials to 5 %", name, each) for name, each in needed.items()]
    rows += [_row("hypervolume", name, each) for name, each in shares.items()]
    rows += [_row("s a trial", name, [each]) for name, each in seconds.items()]
    record("search_synthetic_cpu", rows, seeds=len(SEEDS))
    if median(needed["tpe"]) >= median(needed["random"]) or min(shares["nsga2"]) < 0.9:
        raise SystemExit("TPE is not ahead of random points, or NSGA-II covers less than 90 %")


if __name__ == "__main__":
    main()
