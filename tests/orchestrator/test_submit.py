"""What a submission refuses before it touches cluster or tracker. Submissions that run are in `tests/jobs`."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli
from dabnn.errors import InvalidInputError
from orchestrator.config import load_config
from orchestrator.submit import plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        monkeypatch.setenv("DAB_HOME", folder)
        yield Path(folder)


def test_a_plan_says_what_would_run_and_where(digits: Path, own_home: Path) -> None:
    ready = plan(load_config(EXAMPLE, [f"data.train={digits}"]), sweep=False)
    assert (ready.cpus, ready.storage) == (2.0, str(own_home / "storage"))
    assert ready.float_bytes > 10 * ready.packed_bytes > 0
    assert len(ready.digest) == 64
    assert ready.config.data.val == str(digits)


def test_a_sweep_without_a_space_is_refused(digits: Path) -> None:
    config = load_config(None, ["name=run", "model={name: bincifarfbin, in_channels: 1}", f"data.train={digits}"])
    with pytest.raises(InvalidInputError, match=r"^search: missing, so there is nothing to sweep over"):
        plan(config, sweep=True)


def test_a_space_that_leaves_the_model_is_refused_before_a_trial_meets_it(digits: Path) -> None:
    wide = [
        f"data.train={digits}",
        "search.space={binarize.bin_end: {int: [5, 9]}, schedule.name: {choice: [cosine, decay]}}",
    ]
    with pytest.raises(InvalidInputError, match=r"^binarize\.bin_end: 9 is outside the model, which has 8"):
        plan(load_config(EXAMPLE, wide), sweep=True)


def test_a_tracker_that_does_not_answer_is_named_before_anything_starts(
    digits: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", f"data.train={digits}", "--set", "tracking.uri=http://127.0.0.1:1"]
    assert cli.run(["submit", str(EXAMPLE), *arguments, "--json"]) == 1
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert message.startswith("MLflow: no answer from http://127.0.0.1:1; runs are recorded there.")
    assert not (own_home / "cluster.json").exists()
    assert not list(own_home.glob("storage/*"))


def test_a_dry_run_shows_the_plan_and_starts_nothing(
    digits: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["submit", str(EXAMPLE), "--set", f"data.train={digits}", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {
        "config",
        "storage",
        "float_bytes",
        "packed_bytes",
        "digest",
        "cpus",
        "num_binary_layers",
    }
    assert shown["config"]["model"]["num_classes"] == 10
    assert not (own_home / "cluster.json").exists()
    assert not (own_home / "tracking.json").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("binarize.bin_end=99", "binarize.bin_end: 99"),
        ("model.name=bincifarfbim", "model.name: "),
        ("model.num_classes=7", "model.num_classes: 7"),
        ("data.train=/nowhere", "/nowhere"),
        ("train.epoch=3", "train.epoch: "),
        ("tracking.uri=sqlite:///x.db", "tracking.uri: "),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    change: str, field: str, digits: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["submit", str(EXAMPLE), "--set", f"data.train={digits}", "--set", change, "--json"]
    assert cli.run(command) == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"].startswith(field)
    assert {path.name for path in own_home.iterdir()} <= {"storage"}
    assert not list(own_home.glob("storage/*"))
