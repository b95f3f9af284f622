"""Run folders of a sweep as its trials leave them, without any training: for the size and the looks of reports."""

import json
import math
import random
from pathlib import Path
from typing import Any

from dabnn.run_folder import RunFolder
from orchestrator.config import Config, load_config, to_dict, with_overrides

ROOT = Path(__file__).parents[2]
SPACE: dict[str, Any] = {
    "binarize.bin_start": {"int": [2, 4]},
    "binarize.bin_end": {"int": [4, 7]},
    "schedule.name": {"choice": ["decay", "cosine", "one_cycle"]},
    "optim.max_lr": {"log": [1.0e-4, 1.0e-1]},
    "optim.weight_decay": {"float": [0.0, 0.01]},
}
BOTH = ({"metric": "val_top1", "mode": "max"}, {"metric": "packed_bytes", "mode": "min"})


def write_sweep(
    root: Path,
    num_trials: int,
    epochs: int = 20,
    objectives: tuple[dict[str, str], ...] = BOTH,
    constraints: tuple[str, ...] = (),
) -> RunFolder:
    """Write a sweep whose top-1 is a function of its parameters with noise; a third of its trials is stopped early."""
    base = load_config(ROOT / "examples" / "digits.yaml", ["model.num_classes=10", "data.train=/data/digits"])
    folder, draw = RunFolder(root), random.Random(1)
    search = {"space": SPACE, "objectives": list(objectives), "constraints": list(constraints), "algorithm": "tpe"}
    config = to_dict(base) | {"search": search}
    folder.leave_json("job.json", {"name": root.name, "run_id": "5" * 32, "config": config})
    for number in range(num_trials):
        write_trial(folder.child(f"trials/{number:04d}"), number, base, draw, epochs)
    folder.write_result({"status": "finished", "message": "best trial"})
    return folder


def write_trial(folder: RunFolder, number: int, base: Config, draw: random.Random, epochs: int) -> None:
    start = draw.randint(2, 4)
    values = {
        "binarize.bin_start": start,
        "binarize.bin_end": draw.randint(max(start, 4), 7),
        "schedule.name": draw.choice(SPACE["schedule.name"]["choice"]),
        "optim.max_lr": 10 ** draw.uniform(-4, -1),
        "optim.weight_decay": draw.uniform(0, 0.01),
    }
    num_binary = values["binarize.bin_end"] - start + 1
    best = 96 - 2.2 * num_binary - 9 * (math.log10(values["optim.max_lr"]) + 2.4) ** 2 + draw.gauss(0, 1.2)
    best -= 4 * (values["schedule.name"] == "decay")
    lasts = max(2, epochs // 4) if best < 75 else epochs
    folder.leave_json(
        "job.json",
        {"name": f"t{number:04d}", "run_id": f"{number:032x}", "config": to_dict(with_overrides(base, values))},
    )
    static = {"packed_bytes": 46_000 - 5_100 * num_binary, "bit_ops": 900_000 * num_binary}
    told = {
        "number": number,
        "values": values,
        "run_id": f"{number:032x}",
        "name": f"{folder.root.parents[1].name}-t{number:02d}",
    }
    folder.leave_json("trial.json", told | {"static": static})
    lines = []
    for epoch in range(1, lasts + 1):
        top1 = max(8.0, best * (1 - math.exp(-5 * epoch / epochs)) + draw.gauss(0, 0.6))
        metrics = {
            "val_top1": top1,
            "val_loss": (100 - top1) / 25,
            "train_loss": (100 - top1) / 30,
            "layers/02/gap": 0.1,
        }
        lines.append(json.dumps({"step": epoch, "metrics": metrics, "wall_time": 1.0 * epoch}))
    folder.leave("metrics.jsonl", "\n".join(lines) + "\n")
    if number % 41 == 40:
        folder.write_result({"status": "failed", "message": "the loss is not finite (epoch 2, step 7)"})
    else:
        folder.write_result({"status": "finished", "message": "" if lasts == epochs else "stopped early"})
