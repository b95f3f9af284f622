"""What a submission refuses before it touches cluster or tracker. Submissions that run are in `tests/jobs`."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli
from dabnn.errors import InvalidInputError
from orchestrator.config import load_config
from orchestrator.config_space import sampled_points
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
    expected = r"^search\.space: a trial could get binarize\.bin_end=9\. binarize\.bin_end: 9 is outside the model"
    with pytest.raises(InvalidInputError, match=expected):
        plan(load_config(EXAMPLE, wide), sweep=True)


@pytest.mark.parametrize(
    ("changes", "space", "expected"),
    [
        ([], "{model.input_size: {choice: [16, 20]}}", r"model\.input_size=20\. model\.input_size: 20 "),
        ([], "{model.name: {choice: [bincifar, bincifra]}}", r'model\.name="bincifra"\. model\.name: \'bincifra\''),
        (
            ["model.name=bincifar", "binarize={layers: []}"],
            "{model.block: {choice: [reference, bireal]}, optim.max_lr: {log: [1e-4, 1e-3]}}",
            r'model\.block="bireal"\. model\.block: bincifar cannot take',
        ),
        (
            [],
            "{binarize.weights: {choice: [dab, dab_learned]}, binarize.gradient: {choice: [means, straight_through]}}",
            r'binarize\.weights="dab_learned", binarize\.gradient="means"\. binarize\.gradient: means treats',
        ),
        (
            ["binarize={inputs: [8]}", "train={stages: [{name: a, epochs: 3}]}"],
            "{model.name: {choice: [bincifarfbin, sketchanet]}}",
            r'model\.name="sketchanet"\. train\.stages\[0\] \(a\): ',
        ),
    ],
)
def test_a_space_with_a_network_that_cannot_be_built_is_refused(
    changes: list[str], space: str, expected: str, digits: Path
) -> None:
    search = f"search={{early_stop: none, num_trials: 4, space: {space}}}"
    config = load_config(EXAMPLE, [f"data.train={digits}", "schedule={name: cosine}", *changes, search])
    with pytest.raises(InvalidInputError, match=rf"^search\.space: a trial could get {expected}"):
        plan(config, sweep=True)


def test_a_large_space_is_tried_in_part_and_every_value_of_it_once(digits: Path) -> None:
    space = (
        "{binarize.bin_start: {int: [2, 7]}, binarize.bin_end: {int: [2, 7]}, model.width: {float: [0.1, 0.5]}, "
        "binarize.weights: {choice: [dab, dab_learned, dab_warm, xnor]}, model.input_size: {choice: [16, 24, 20, 32]}}"
    )
    config = load_config(EXAMPLE, [f"data.train={digits}", "schedule={name: cosine}", f"search={{space: {space}}}"])
    with pytest.raises(InvalidInputError, match=r"model\.input_size=20.* model\.input_size: 20 "):
        plan(config, sweep=True)
    assert config.search is not None
    tried = list(sampled_points(config.search, list(config.search.space), 64))
    assert len(tried) == len({str(point) for point in tried}) <= 64
    assert {point["binarize.bin_start"] for point in tried} == set(range(2, 8))
    assert all(point["binarize.bin_start"] <= point["binarize.bin_end"] for point in tried)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("train.init_from=runs/a/step-1.pt", "train.init_from: runs/a/step-1.pt is neither a file nor a run."),
        ("train.init_from=best.pt", "train.init_from: best.pt is neither a file nor a run."),
        (
            "train.distill={teacher: a run}",
            "train.distill.teacher: a run is neither a file nor a run that can be taken",
        ),
        (
            "train={stages: [{name: a, epochs: 3, distill: {teacher: ./a}}]}",
            "train.stages[0].distill.teacher: ./a is neither a file nor a run.",
        ),
        ("binarize={plan: none.yaml}", "binarize.plan: none.yaml: no such file"),
    ],
)
def test_a_dry_run_names_what_is_neither_file_nor_run_and_starts_no_tracker(
    change: str, field: str, digits: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ["--set", "search=null", "--set", "schedule={name: cosine}"]
    command = ["submit", str(EXAMPLE), "--set", f"data.train={digits}", *alone, "--set", change, "--dry-run", "--json"]
    assert cli.run(command) == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"].startswith(field)
    assert not (own_home / "tracking.json").exists()
    assert not (own_home / "logs").exists()


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
        "job",
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
