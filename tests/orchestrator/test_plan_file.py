import json
from pathlib import Path

import pytest

from dabnn.errors import InvalidInputError
from orchestrator.plan_file import load_plan, write_plan


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    plan: dict[str, list[int | str]] = {"binary_weights": [2, "conv3", "no", "stage[34].*", "1"], "binary_inputs": [2]}
    file = tmp_path / "new" / "plan.yaml"
    write_plan(file, plan, comments=["proposed for a budget", ""])
    assert load_plan(file) == plan
    assert file.read_text().startswith("# proposed for a budget\n#\nweights: [2,")


def test_json_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"weights": [2, "conv3"]}))
    assert load_plan(file) == {"binary_weights": [2, "conv3"], "binary_inputs": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weigths: [1]", r"plan\.yaml: 'weigths' is not known\. Did you mean 'weights'\?"),
        ("weights: 3", r"plan\.yaml: weights: 3 is no list"),
        ("inputs: [1.5]", r"plan\.yaml: inputs: holds 1\.5, which names no layer; write numbers, paths or"),
        ("inputs: [true]", r"plan\.yaml: inputs: holds true, which names no layer"),
        ("inputs: [0]", r"plan\.yaml: inputs: holds 0, and layer numbers start at 1"),
        ("", r"plan\.yaml: is no plan\. Write"),
        ("- 1", r"plan\.yaml: is no plan"),
        ("weights: [1", r"plan\.yaml: not valid YAML, line"),
        ("weights: [1]\nweights: [2]", r"plan\.yaml: not valid YAML, line 1.*'weights' stands here twice"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        load_plan(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"none\.yaml: no such file"):
        load_plan(tmp_path / "none.yaml")
