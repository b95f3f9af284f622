"""What a search starts from: the best points of another one, or what a run was."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dabnn.models import build
from dabnn.plans import numbered_convs
from dabnn.run_folder import RunFolder
from dabnn.sensitivity import LayerFigures
from orchestrator.config import Config, load_config, to_dict
from orchestrator.config_search import Search
from orchestrator.config_space import END, START
from orchestrator.job import Job
from orchestrator.resolve import train_spec
from orchestrator.start_points import NUM_POINTS, start_points
from orchestrator.study import Study

SPACE: dict[str, Any] = {START: {"int": [2, 7]}, END: {"int": [2, 7]}, "optim.max_lr": {"log": [1e-4, 1e-2]}}


def search_of(space: dict[str, Any], **values: Any) -> Search:
    return Search.model_validate({"space": space, "early_stop": "none", "num_trials": 12, **values})


def run_in(folder: Path, *overrides: str) -> Config:
    base = ["name=run", "model.name=bincifarfbin", "model.num_classes=10", "data.train=shards"]
    config = load_config(None, [*base, *overrides])
    Job("train", "0" * 32, "run", str(folder), "http://127.0.0.1:1", "dab", 1, to_dict(config)).save()
    return config


def test_the_best_points_of_a_sweep_come_first(tmp_path: Path) -> None:
    study = Study.open(tmp_path / "study.jsonl", search_of(SPACE), seed=1)
    while (point := study.ask()) is not None:
        study.tell(point.number, {"val_top1": -abs(point.number - 6.2)} if point.number != 6 else None)
    points = start_points(RunFolder(tmp_path), search_of(SPACE))
    values = [trial.values for trial in study.trials()]
    assert points == [values[number] for number in (7, 5, 8, 4, 9)]
    assert len(points) == NUM_POINTS


def test_a_run_starts_a_search_with_its_own_values_and_layers(tmp_path: Path) -> None:
    run_in(tmp_path, "optim.max_lr=2e-3")
    (point,) = start_points(RunFolder(tmp_path), search_of(SPACE | {"binarize.weights": {"choice": ["dab", "xnor"]}}))
    assert point == {START: 2, END: 7, "optim.max_lr": 2e-3, "binarize.weights": "dab"}
    (point,) = start_points(RunFolder(tmp_path), search_of({"binarize.layers": {"subset": [1, 2, "conv3"]}}))
    assert point == {"binarize.layers": [2, "conv3"]}


def test_the_plan_of_dab_sensitivity_comes_second(tmp_path: Path) -> None:
    config = run_in(tmp_path, "optim.max_lr=2e-3", "model.width=0.1")
    spec = train_spec(config).model
    net = build(**spec)
    torch.save({"net": net.state_dict(), "model": spec}, tmp_path / "step-1.pt")
    figures = [figures_of(index, path) for index, (path, _) in numbered_convs(net).items()]
    found = {"checkpoint": str(tmp_path / "step-1.pt"), "layers": figures, "num_images": 100, "top1_reestimated": 60.0}
    RunFolder(tmp_path).leave_json("sensitivity.json", found)
    own, plan = start_points(RunFolder(tmp_path), search_of(SPACE))
    assert own == {START: 2, END: 7, "optim.max_lr": 2e-3}
    assert plan == {START: 2, END: 6, "optim.max_lr": 2e-3}, "layer 7 costs much accuracy and few operations"


def figures_of(index: int, path: str) -> dict[str, Any]:
    """Return what is measured of a layer of which the seventh is worth most as a real one."""
    is_binary = 2 <= index <= 7
    gain = (20.0 if index == 7 else -1.0) if is_binary else None
    return asdict(LayerFigures(index, path, is_binary, is_binary, 0.5, 0.5, 0.5, 0.1, gain, gain, None, None))
