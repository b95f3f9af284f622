"""Commands about packed files whose arguments are wrong: each answers at once, and starts and makes nothing."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

import cli
from dabnn.errors import InvalidInputError
from dabnn.models import build
from dabnn.packed import Normalization, pack
from orchestrator.doctor import _database_complaint
from orchestrator.found_runs import check_no_file

Dab = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that nobody has made yet."""
    monkeypatch.setenv("DAB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def dab(capsys: pytest.CaptureFixture[str]) -> Dab:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return cli.run([str(argument) for argument in arguments]), *capsys.readouterr()

    return run


def model_file(folder: Path, classes: list[str]) -> Path:
    net = build("bincifarfbin", num_classes=len(classes), in_channels=1, input_size=16, width=0.0625, seed=0)
    path = folder / "model.safetensors"
    pack(net, classes=classes, normalization=Normalization((0.3,), (0.4,), "plain")).save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("evaluate", "/no/such/file.safetensors"), "/no/such/file.safetensors: no such file. Give a run, or a file"),
        (("evaluate", "model.PT2"), "model.PT2: no such file"),
        (("evaluate", "model.safetensor", "--data", "x"), "model.safetensor: no such file"),
        (("bench", "folder/model"), "folder/model: no such file"),
        (("bench", "resnetbin20"), "resnetbin20: no model of `dab models`; did you mean resnet20?"),
        (("bench", "m.ONNX"), "m.ONNX: a file of the form onnx, and only packed models are measured"),
        (("bench", "m.pt2"), "m.pt2: a file of the form pt2, and only packed models are measured"),
        (("export", "3f", "--format", "pt2", "-o", "o.onnx"), "--format: pt2 for o.onnx, but a name like that is read"),
        (("export", "3f", "-o", "o.x", "--format", "tflite"), "--format: no 'tflite'"),
    ],
)
def test_a_mistyped_target_is_told_before_anything_starts(
    arguments: tuple[str, ...], expected: str, dab: Dab, home: Path, tmp_path: Path
) -> None:
    for name in ("m.ONNX", "m.pt2"):
        (tmp_path / name).touch()
    code, out, err = dab(*arguments)
    assert (code, out) == (2, "")
    assert f"error: {expected}" in err
    assert "tracker\n" not in err
    assert not home.exists()


@pytest.mark.parametrize("name", ["digits", "lr0.1", "run.v2", "3f2a", "ends in."])
def test_a_name_that_a_run_can_have_is_no_file(name: str) -> None:
    check_no_file(name, "a run")


@pytest.mark.parametrize("name", ["a/b", "m.onnx", "m.pt2", "m.PT2", "m.tar"])
def test_a_name_that_a_file_has_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{name}: no such file\. Give a run; a run of such a name"):
        check_no_file(name, "a run")


def test_good_images_are_shown_where_others_are_bad(dab: Dab, tmp_path: Path) -> None:
    file = model_file(tmp_path, ["a", "b"])
    good, bad, missing = (tmp_path / name for name in ("good.png", "bad.png", "missing.png"))
    Image.new("L", (8, 8), 99).save(good)
    bad.write_bytes(b"no image")
    code, out, err = dab("predict", file, bad, good, missing)
    assert code == 1
    assert out.startswith(f"{good}: ")
    assert out.count("\n") == 1
    assert [line.partition(": no readable image")[0] for line in err.splitlines()] == [
        f"error: {bad}",
        f"error: {missing}",
    ]
    code, out, _ = dab("predict", file, bad, good, "--json")
    found = json.loads(out)
    assert (code, [entry["image"] for entry in found["predictions"]]) == (1, [str(good)])
    assert [entry["image"] for entry in found["problems"]] == [str(bad)]
    code, out, err = dab("predict", file, bad)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {bad}: no readable image")


def test_names_of_classes_neither_steer_the_terminal_nor_make_lines(dab: Dab, tmp_path: Path) -> None:
    file, image = model_file(tmp_path, ["\x1b[31mred", "x 0 %\nother.png: y"]), tmp_path / "x.png"
    Image.new("L", (8, 8), 99).save(image)
    code, out, _ = dab("predict", file, image)
    assert code == 0
    assert out.count("\n") == 1
    assert r"\x1b[31mred" in out
    assert r"x 0 %\x0aother.png: y" in out


@pytest.mark.parametrize("folder", ["plain", "a?b", "a#b", "a%20b", "a b;c&d"])
def test_the_doctor_reads_a_database_in_any_folder_and_writes_nothing(folder: str, tmp_path: Path) -> None:
    database = tmp_path / folder / "mlflow.db"
    database.parent.mkdir()
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE experiments (name TEXT)")
        connection.commit()
    before = database.read_bytes()
    assert _database_complaint(database) == ""
    assert _database_complaint(tmp_path / folder / "none.db") == "unable to open database file"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([folder, "mlflow.db"])
    assert database.read_bytes() == before
