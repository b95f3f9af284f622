"""The program as a person starts it: a process with arguments, an exit code, stdout and stderr."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from PIL import Image

import cli
from dabnn.errors import DabError, InvalidInputError

ROOT = Path(__file__).parents[1]


def dab(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )


def write_config(folder: Path, text: str = "") -> Path:
    path = folder / "run.yaml"
    path.write_text(f"name: run\nmodel: {{name: bincifar}}\ndata: {{train: shards}}\n{text}")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few images in two classes."""
    source = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for label, shade in (("dark", 10), ("light", 240)):
            (source / split / label).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), shade + number).save(source / split / label / f"{number}.png")
    return source


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def dab_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """As `dab`, in this process: commands that import torch would otherwise take seconds each to start."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return run


def test_help_imports_nothing_heavy():
    program = (
        "import sys, cli\n"
        "codes = [cli.run(['--help'])]\n"
        "heavy = {'pydantic', 'numpy', 'rich'} & set(sys.modules)\n"
        "codes += [cli.run([*a, '--help']) for a in (['data'], ['data', 'build'], ['models', 'show'])]\n"
        "heavy |= {'torch', 'ray', 'mlflow', 'optuna'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if heavy or any(codes) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_command_takes_json_and_shows_an_example():
    def commands(group, path):
        for name, command in group.commands.items():
            yield from commands(command, [*path, name]) if hasattr(command, "commands") else [([*path, name], command)]

    for path, command in commands(typer.main.get_command(cli.app), ["dab"]):
        assert (command.epilog or "").startswith(f"Example: {' '.join(path)}"), path
        assert "--json" in [option for parameter in command.params for option in parameter.opts], path
        assert command.help, path


def test_a_dataset_is_built_and_checked(dab_here, photos, tmp_path):
    built = dab("data", "build", photos, tmp_path / "shards", "--json")
    assert built.returncode == 0, built.stderr
    document = json.loads(built.stdout)
    assert document["classes"] == ["dark", "light"]
    assert {name: split["num_samples"] for name, split in document["splits"].items()} == {"train": 8, "val": 8}
    assert "16/16 images" in built.stderr
    checked = dab_here("data", "check", tmp_path / "shards", "--json")
    assert (checked.returncode, json.loads(checked.stdout)) == (0, {"ok": True, "problems": []})


def test_a_person_is_told_the_next_command_with_their_own_names(dab_here, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = dab_here("data", "build", photos, "my shards")
    assert built.returncode == 0, built.stderr
    assert built.stderr.splitlines()[-1] == "next: dab data check 'my shards'"
    assert "train" in built.stdout
    assert "next:" not in built.stdout


def test_a_damaged_shard_is_named_and_the_exit_code_is_1(dab_here, photos, tmp_path):
    assert dab_here("data", "build", photos, tmp_path / "shards").returncode == 0
    shard = min((tmp_path / "shards").glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-700])
    checked = dab_here("data", "check", tmp_path / "shards", "--json")
    assert checked.returncode == 1
    document = json.loads(checked.stdout)
    assert not document["ok"]
    assert {problem["shard"] for problem in document["problems"]} == {shard.name}


def test_models_are_listed_and_shown(dab_here):
    assert "bincifarfbin" in json.loads(dab_here("models", "--json").stdout)["models"]
    shown = dab_here("models", "show", "bincifarfbin", "--bin-start", 3, "--bin-end", 5, "--width", 0.25, "--json")
    assert shown.returncode == 0, shown.stderr
    layers = json.loads(shown.stdout)["layers"]
    assert [layer["index"] for layer in layers if layer["binary_weights"]] == [3, 4, 5]


def test_a_shown_model_has_the_published_number_of_parameters(dab_here):
    assert "8,509,818 parameters" in dab_here("models", "show", "sketchanetfbin").stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("models", "show", "bincifarfbn"), "bincifarfbin"),
        (("models", "show", "bincifar", "--bin-start", 2, "--bin-end", 20), "bin_end"),
        (("models", "show", "bincifar", "--width", "wide"), "--width"),
        (("data", "check", "nothing/here"), "nothing/here"),
        (("data", "build", "nothing/here", "shards"), "nothing/here"),
    ],
)
def test_invalid_input_to_the_science_is_one_message(dab_here, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    done = dab_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr


def test_a_packed_model_is_measured_beside_its_float_peer(dab_here, tmp_path):
    from dabnn.bench_networks import random_network
    from dabnn.packed import pack

    file = tmp_path / "model.safetensors"
    file_bytes = pack(random_network("bincifarfbin", num_classes=10, width=0.125)).save(file)
    done = dab_here("bench", file, "--threads", 1, "--turns", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["source"], found["model"], found["batch"], found["turns"]) == ("file", "bincifarfbin", 1, 2)
    assert found["packed"]["file_bytes"] == file_bytes < found["float"]["file_bytes"]
    for form in (found["packed"], found["float"]):
        assert 0 < form["best_ms"] <= form["median_ms"]
        assert 0 < form["base_bytes"] < form["peak_bytes"]
    assert 0 < found["float_share"] < 1
    assert sum(layer["kind"] == "binary" for layer in found["layers"]) == found["num_checked"] == 6
    assert "12/12 measurements" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("bench", "nothing.safetensors"), "nothing.safetensors: no such file"),
        (("bench", "bincifarfbin", "--dtype", "float8"), "dtype: 'float8'"),
        (("bench", "bincifarfbin", "--input-size", 3), "model.input_size"),
        (("bench", "bincifarfbin", "--batch", 0), "--batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(dab_here, arguments, expected):
    done = dab_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr


def test_the_doctor_looks_at_everything_and_starts_and_makes_nothing(dab_here, tmp_path, monkeypatch):
    monkeypatch.setenv("DAB_HOME", str(tmp_path / "home"))
    done = dab_here("doctor", "--json")
    found = json.loads(done.stdout)
    statuses = {check["name"]: check["status"] for check in found["checks"]}
    assert all(check.keys() == {"name", "status", "detail", "advice"} for check in found["checks"])
    assert {
        "python",
        "packages",
        "devices",
        "store",
        "shared memory",
        "experiment tracker",
        "cluster",
    } <= statuses.keys()
    assert found["ok"] == ("problem" not in statuses.values()) == (done.returncode == 0)
    assert statuses["python"] == statuses["cluster"] == "ok"
    assert not (tmp_path / "home").exists()


def test_the_doctor_says_what_to_do_and_its_exit_code_is_1_when_there_is_a_problem(dab_here, tmp_path, monkeypatch):
    monkeypatch.setenv("DAB_HOME", str(tmp_path))
    (tmp_path / "mlflow.db").write_text("no database")
    done = dab_here("doctor")
    assert done.returncode == 1
    assert any(line.startswith("problem  experiment tracker") for line in done.stdout.splitlines())
    assert f"experiment tracker: Restore {tmp_path / 'mlflow.db'}" in done.stdout
    monkeypatch.setenv("DAB_HOME", str(tmp_path / "mlflow.db"))
    broken = {check["name"]: check["status"] for check in json.loads(dab_here("doctor", "--json").stdout)["checks"]}
    assert broken["store"] == "problem"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("config", "show", "nothing.yaml"), "nothing.yaml: no such file"),
        (("config", "sho"), "No such command 'sho'"),
        (("data", "build"), "Missing argument 'SRC'"),
        (("--frobnicate",), "No such option"),
    ],
)
def test_invalid_input_is_one_message_and_exit_code_2(tmp_path, arguments, expected):
    done = dab(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("config", "show", "nothing.yaml"), ("data", "build"), ("config", "sho")])
def test_with_json_an_error_is_a_document_on_stdout_too(tmp_path, arguments):
    done = dab(*arguments, "--json", cwd=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["exit_code"]) == (2, 2)
    assert error["message"] in done.stderr


@pytest.mark.parametrize("arguments", [(), ("data",), ("config",)])
def test_a_group_without_a_command_shows_its_help_as_a_usage_error(arguments):
    done = dab(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: dab")


def test_an_unknown_key_is_refused_and_the_nearest_named(tmp_path):
    done = dab("config", "show", write_config(tmp_path), "--set", "train.epoch=10")
    assert done.returncode == 2
    assert done.stderr.startswith("error: train.epoch: unknown key; did you mean train.epochs?")


def test_a_configuration_is_shown_resolved_as_yaml_that_can_be_used_again(tmp_path):
    shown = dab("config", "show", write_config(tmp_path), "--set", "train.epochs=3", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    again = tmp_path / "again.yaml"
    again.write_text(shown.stdout)
    document = json.loads(dab("config", "show", again, "--json").stdout)
    assert document["train"]["epochs"] == 3
    assert document["data"]["val"] == document["data"]["train"] == str(tmp_path / "shards")


def test_the_schema_is_json():
    assert json.loads(dab("config", "schema").stdout)["properties"]["train"]
    assert json.loads(dab("config", "schema", "--json").stdout)["properties"]["train"]


def test_a_reader_that_goes_away_causes_no_traceback():
    command = [sys.executable, "-m", "cli", "config", "schema"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_an_interruption_has_exit_code_130_and_no_traceback(tmp_path):
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "cli", "config", "show", pipe, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with pipe.open("w"):  # opens when the program has: it is then waiting for a configuration
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (130, "error: interrupted\n")
        assert json.loads(stdout)["error"]["exit_code"] == 130


@pytest.mark.parametrize(("failure", "code"), [(DabError("a worker died"), 1), (InvalidInputError("x: bad"), 2)])
def test_our_own_exceptions_become_a_message_and_their_exit_code(monkeypatch, capsys, failure, code):
    monkeypatch.setattr(cli, "app", app_that_raises(failure))
    assert cli.run([]) == code
    assert capsys.readouterr() == ("", f"error: {failure}\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", app_that_raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.run([])


def app_that_raises(failure: Exception) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise failure

    return app
