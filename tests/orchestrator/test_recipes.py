"""Configurations of stages, plans and weights from elsewhere: what they become, and what is refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dabnn.checkpoints import CheckpointWriter, Moment, list_checkpoints
from dabnn.errors import InvalidInputError
from dabnn.models import build
from dabnn.spec import CheckpointPolicy
from orchestrator.config import Config, flatten, load_config, parts, resolve_paths, to_dict, to_yaml
from orchestrator.resolve import model_table, resolve, train_spec

STAGES: list[dict[str, Any]] = [
    {"name": "float", "epochs": 4, "binarize": {"inputs": "none", "layers": []}, "optim": {"weight_decay": 0.01}},
    {"name": "binary", "epochs": 6, "distill": {"teacher": "stage:float"}},
]
BASE: dict[str, Any] = {
    "name": "run",
    "model": {"name": "bincifarfbin", "width": 0.0625, "input_size": 16, "in_channels": 1},
    "binarize": {"bin_start": 2, "bin_end": 7},
    "data": {"train": "shards"},
    "optim": {"name": "sgd"},
    "schedule": {"name": "cosine"},
}


def load(folder: Path, stages: list[dict[str, Any]] | None, *overrides: str, **sections: Any) -> Config:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(BASE | sections | ({"train": {"stages": stages}} if stages else {})))
    return load_config(path, overrides)


def refusal(folder: Path, stages: list[dict[str, Any]] | None, *overrides: str, **sections: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        load(folder, stages, *overrides, **sections)
    return str(caught.value)


def changed(position: int, **values: Any) -> list[dict[str, Any]]:
    return [stage | values if position == index else stage for index, stage in enumerate(STAGES)]


def test_a_stage_changes_only_the_keys_that_it_writes(tmp_path: Path) -> None:
    (_, first), (name, second) = parts(load(tmp_path, STAGES))
    assert (first.binarize.layers, first.binarize.bin_start, first.binarize.inputs) == ((), None, "none")
    assert (first.optim.name, first.optim.weight_decay, first.train.distill) == ("sgd", 0.01, None)
    assert (name, second.binarize, second.train.epochs) == ("binary", load(tmp_path, STAGES).binarize, 6)
    assert second.train.distill is not None
    assert second.train.distill.teacher == "stage:float"


def test_null_takes_away_what_the_run_has_and_silence_keeps_it(tmp_path: Path) -> None:
    stages = changed(0, kurtosis=None)
    config = load(tmp_path, stages, "train.kurtosis={weight: 0.5}", "train.label_smoothing=0.1")
    (_, first), (_, second) = parts(config)
    assert first.train.kurtosis is None
    assert second.train.kurtosis is not None
    assert (first.train.label_smoothing, second.train.label_smoothing) == (0.1, 0.1)
    assert load_config(write(tmp_path, to_yaml(config))) == config
    again = Config.model_validate_json(json.dumps(to_dict(config)))
    assert parts(again) == parts(config)
    assert json.loads(str(flatten(config)["train.stages"]))[0] == stages[0]


def test_null_takes_label_smoothing_away(tmp_path: Path) -> None:
    config = load(tmp_path, changed(0, label_smoothing=None), "train.label_smoothing=0.1")
    assert [part.train.label_smoothing for _, part in parts(config)] == [0.0, 0.1]
    assert parts(load_config(write(tmp_path, to_yaml(config)))) == parts(config)


def test_a_mistake_in_a_stage_is_one_line(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, changed(0, epochs=0)).splitlines()) == 1
    assert len(refusal(tmp_path, [STAGES[0] | {"epoch": 3}]).splitlines()) == 1


def test_options_without_effect_are_fine_in_one_stage_while_another_uses_them(tmp_path: Path) -> None:
    assert load(tmp_path, STAGES, "binarize.input_ste_width=2", "binarize.ste_width=2")
    message = refusal(tmp_path, changed(0, binarize={"inputs": "none", "layers": [], "ste": "ede"}))
    assert message.startswith("train.stages[0].binarize.ste: has no effect with binarize.layers=[].")


def write(folder: Path, text: str) -> Path:
    path = folder / "again.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (changed(1, epoch=3), "train.stages[1].epoch: unknown key; did you mean train.stages[1].epochs?"),
        (changed(0, optim={"lr": 3}), "train.stages[0].optim.lr: unknown key; did you mean train.stages[0].optim"),
        (changed(0, epochs=0), "train.stages[0].epochs: 0 must be at least 1"),
        ([{"name": "a"}], "train.stages[0].epochs: missing (passes over the training split). Add it to the file."),
        (changed(1, name="float"), "train.stages[1].name: 'float' stands there twice"),
        (changed(1, distill={"teacher": "stage:flaot"}), "train.stages[1].distill.teacher: stage:flaot is no earlier"),
        (changed(0, distill={"teacher": "stage:float"}), "train.stages[0].distill.teacher: stage:float is no earlier"),
        (changed(1, schedule={"warmup_epochs": 6}), "train.stages[1] (binary): schedule.warmup_epochs: 6.0 is all of"),
        (changed(1, schedule={"interval": 3}), "train.stages[1].schedule.interval: has no effect with schedule.name"),
        (changed(1, schedule={"name": "step"}), "train.stages[1] (binary): schedule.milestones: missing"),
        (changed(1, binarize={"layers": [2], "bin_end": 3}), "train.stages[1] (binary): binarize.layers: "),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_be_is_refused_by_its_place(
    stages: list[dict[str, Any]], expected: str, tmp_path: Path
) -> None:
    assert refusal(tmp_path, stages).startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.epochs=7"], "train.epochs: 7, but the stages take 10 epochs together"),
        (["search={space: {seed: {choice: [1, 2]}}}"], "search.early_stop: asha would end trials in an early stage"),
        (["search={early_stop: none, epochs: 3, space: {seed: {choice: [1, 2]}}}"], "search.epochs: 3, but with"),
        (["search={early_stop: none, space: {train.epochs: {int: [1, 2]}}}"], "search.space.train.epochs: each stage"),
    ],
)
def test_what_has_no_meaning_with_stages_is_refused(overrides: list[str], expected: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, STAGES, *overrides).startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["binarize.layers=[2]"], "binarize.layers: binarize.bin_start and binarize.bin_end already chose"),
        (["binarize={plan: p.yaml, inputs: [2]}"], "binarize.inputs: binarize.plan already names"),
        (["train.distill={teacher: 'stage:a'}"], "train.distill.teacher: stage:a names a stage, and the run has none"),
        (["optim={decay_all: true}"], "optim.decay_all: has no effect with optim.weight_decay=0"),
        (["schedule={name: step}"], "schedule.milestones: missing"),
        (["schedule={name: step, milestones: [100]}"], "schedule.milestones: 100 is not below train.epochs=100"),
        (["schedule.milestones=[3]"], "schedule.milestones: has no effect with schedule.name=cosine"),
        (["binarize.ste=identity", "binarize.ste_width=2"], "binarize.ste_width: has no effect with binarize.ste"),
    ],
)  # fmt: skip
def test_recipes_that_contradict_themselves_are_refused(overrides: list[str], expected: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, None, *overrides).startswith(expected)


def test_the_specification_has_the_stages_and_describes_the_last_network(digits: Path, tmp_path: Path) -> None:
    stages = [*changed(1, kurtosis={"weight": 0.1}), STAGES[0] | {"name": "short", "epochs": 1}]
    spec = train_spec(resolve(load(tmp_path, stages[:2], f"data.train={digits}", "train.ema_decay=0.9")))
    assert [(stage.name, stage.epochs, stage.schedule.epochs) for stage in spec.parts] == [
        ("float", 4, 4),
        ("binary", 6, 6),
    ]
    assert (spec.epochs, spec.ema_decay, spec.stages[0].optim.weight_decay) == (10, 0.9, 0.01)
    assert asdict(spec.stages[1].loss) == {
        "label_smoothing": 0.0,
        "kurtosis": {"weight": 0.1, "target": 1.8},
        "distill": {"teacher": "stage:float", "temperature": 4.0, "weight": 0.5},
    }
    config = resolve(load(tmp_path, stages, f"data.train={digits}"))
    assert config.train.epochs == 11
    assert not any(row.binary_weights for row in model_table(config).layers), "of the last stage, which is float"


def test_a_plan_file_is_written_into_the_configuration(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("weights: [2, 'conv[34]']\ninputs: [3]\n")
    stages = changed(1, binarize={"plan": "plan.yaml"})
    config = resolve(resolve_paths(load(tmp_path, stages, f"data.train={digits}"), tmp_path))
    (tmp_path / "plan.yaml").unlink()
    rows = model_table(Config.model_validate_json(json.dumps(to_dict(config)))).layers
    assert [row.index for row in rows if row.binary_weights] == [2, 3, 4]
    assert [row.index for row in rows if row.binary_inputs] == [3]


def test_a_layer_of_a_stage_that_does_not_exist_is_refused_before_anything_runs(digits: Path, tmp_path: Path) -> None:
    stages = changed(1, binarize={"layers": ["conv33"]})
    expected = r"^train\.stages\[1\] \(binary\): binarize\.layers: 'conv33' names no layer.*conv3"
    with pytest.raises(InvalidInputError, match=expected):
        resolve(load(tmp_path, stages, f"data.train={digits}"))


@pytest.mark.parametrize(("where", "prefix"), [("run", ""), ("stage", r"train\.stages\[1\] \(binary\): ")])
def test_a_layer_of_a_plan_file_that_does_not_exist_is_refused_with_the_file(
    where: str, prefix: str, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text("inputs: [conv33]\n")
    stages = changed(1, binarize={"plan": "plan.yaml"}) if where == "stage" else None
    sections = {} if where == "stage" else {"binarize": {"plan": "plan.yaml"}}
    config = resolve_paths(load(tmp_path, stages, f"data.train={digits}", **sections), tmp_path)
    with pytest.raises(
        InvalidInputError, match=rf"^{prefix}binarize\.plan\.inputs: 'conv33' .*that of .*/plan\.yaml\."
    ):
        resolve(config)


@pytest.mark.parametrize("key", ["train.init_from", "train.distill.teacher"])
def test_a_file_that_is_no_checkpoint_is_refused_with_the_key_and_without_torch_s_advice(
    key: str, digits: Path, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"not a checkpoint")
    value = f"{{teacher: {file}}}" if key.endswith("teacher") else file
    config = load(tmp_path, None, f"data.train={digits}", f"{key.removesuffix('.teacher')}={value}")
    with pytest.raises(InvalidInputError) as caught:
        resolve(config)
    assert str(caught.value).startswith(f"{key}: {file} is no checkpoint of dab, or is damaged. Name a run, or a step-")
    assert "weights_only" not in str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A checkpoint of a network of three classes."""
    net = build("bincifarfbin", num_classes=3, in_channels=1, input_size=16, width=0.0625, seed=1)
    writer = CheckpointWriter(tmp_path / "other", CheckpointPolicy())
    writer.save({"model": asdict(net.spec), "net": net.state_dict()}, Moment(1, 1), {"val_top1": 1.0})
    writer.wait()
    return list_checkpoints(tmp_path / "other")[0].path


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.init_from={}", r"^train\.init_from: .*: holds another architecture: conv8\.weight is \(3, "),
        ("train.distill={{teacher: {}}}", r"^train\.distill\.teacher: .* has num_classes=3, the network .* 10"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_training(
    override: str, expected: str, checkpoint: str, digits: Path, tmp_path: Path
) -> None:
    config = load(tmp_path, None, f"data.train={digits}", override.format(checkpoint))
    with pytest.raises(InvalidInputError, match=expected):
        resolve(config)


def test_a_run_that_is_named_is_looked_up_and_its_file_written_down(digits: Path, tmp_path: Path) -> None:
    net = build("bincifarfbin", num_classes=10, in_channels=1, input_size=16, width=0.0625, seed=1)
    file = tmp_path / "best.pt"
    torch.save({"model": asdict(net.spec), "net": net.state_dict()}, file)
    asked: list[str] = []

    def find(name: str) -> str:
        asked.append(name)
        return str(file)

    config = load(tmp_path, None, f"data.train={digits}", "train.init_from=a run", "train.distill={teacher: other}")
    resolved = resolve(resolve_paths(config), find)
    assert asked == ["a run", "other"]
    assert resolved.train.init_from == str(file)
    assert train_spec(resolved).loss.distill.teacher == str(file)  # type: ignore[union-attr]
    with pytest.raises(InvalidInputError, match=r"^train\.init_from: a run is neither a file nor a run"):
        resolve(config)
