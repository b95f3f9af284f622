"""What `dab sensitivity` tells to train next is a command that works."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import Config, alone, load_config, parts, to_dict, to_yaml
from orchestrator.search import trial_config
from orchestrator.sensitivity import changes_for_plan, float_twin, without

EXAMPLES = Path(__file__).parents[2] / "examples"

BASE = ["name=run", "model.name=bincifarfbin", "data.train=shards", "schedule={name: cosine}"]
STAGES = (
    "train.stages=[{name: float, epochs: 3, binarize: {inputs: none, layers: []}}, "
    "{name: weights, epochs: 3, binarize: {inputs: none}}, %s]"
)


def found(config: Config) -> dict[str, Any]:
    stages = to_dict(config)["train"]["stages"]
    return {"name": "run", "without": without(config), "stages": stages}


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["binarize={bin_start: 2, bin_end: 7, inputs: [2, 3]}"],
        ["binarize={layers: [2, 3]}"],
        ["binarize={bin_start: 2, bin_end: 7}", STAGES % "{name: both, epochs: 4, optim: {max_lr: 0.001}}"],
        ["binarize={inputs: [2]}", STAGES % "{name: both, epochs: 4, binarize: {bin_end: 5, ste: ede, inputs: none}}"],
        ["binarize={layers: [2]}", STAGES % "{name: both, epochs: 4, distill: {teacher: 'stage:float'}}"],
    ],
)
def test_the_plan_is_what_the_measured_network_gets(changes: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*BASE, *changes])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    planned = load_config(file, changes_for_plan(found(config), "plan.yaml"))
    assert planned.name == "run-plan"
    assert parts(planned)[-1][1].binarize.plan == "plan.yaml"
    assert parts(planned)[:-1] == tuple(
        (name, part.model_copy(update={"name": "run-plan"})) for name, part in parts(config)[:-1]
    )


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_command_for_a_float_twin_is_accepted(example: Path, tmp_path: Path) -> None:
    config = load_config(example)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(alone(config)))
    dab, submit, named, *changes = float_twin(config, str(file))
    assert (dab, submit, named, changes[::2]) == ("dab", "submit", str(file), ["--set"] * (len(changes) // 2))
    twin = load_config(file, changes[1::2])
    assert (twin.train.stages, twin.binarize.inputs, twin.binarize.bin_start) == (None, "model", None)
    assert to_dict(twin)["binarize"]["plan"] == {"weights": [], "inputs": []}


def test_the_file_of_a_run_or_trial_of_a_searched_configuration_is_accepted(tmp_path: Path) -> None:
    config = load_config(EXAMPLES / "digits.yaml")
    for single in (alone(config), alone(trial_config(config))):
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(single))
        again = load_config(file)
        assert again == single
        assert (again.search, again.schedule.name, again.schedule.interval) == (None, "cosine", 50)
