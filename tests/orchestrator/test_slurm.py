"""The sbatch script: what it asks Slurm for, that it is bash whatever a run is called, and what is refused."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dabnn.errors import InvalidInputError
from orchestrator.config import Config, load_config
from orchestrator.slurm import sbatch_script, write_script

NASTY = """it's $(touch "pwned") `id` ; "x" #SBATCH --uid=0"""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAB_HOME", str(tmp_path / "home"))


def write_config(folder: Path, **values: object) -> Path:
    raw = {"name": "run", "model": {"name": "bincifar"}, "data": {"train": "shards"}, **values}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def script_of(config: Config, *, num_nodes: int = 2, gpus_per_node: int = 0, folder: str = "/shared/dab") -> str:
    return sbatch_script(
        config,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        program=Path("/opt/it's here/bin"),
        folder=Path(folder),
    )


def directives(text: str) -> list[str]:
    """Return the options that Slurm reads: `#SBATCH` lines before the first command."""
    lines = text.splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    return [line.removeprefix("#SBATCH --") for line in header if line.startswith("#SBATCH")]


def assigned(text: str, name: str) -> str:
    """Return what bash makes of an assignment: the script's lines before its body, then the variable."""
    head = text[: text.index("set -euo pipefail")]
    shown = subprocess.run(
        ["bash", "-c", f'{head}\nprintf %s "${name}"'], check=True, capture_output=True, text=True, env={}
    )
    return shown.stdout


def test_the_script_asks_for_whole_nodes_with_one_task_each(tmp_path: Path) -> None:
    asked = directives(script_of(load_config(write_config(tmp_path))))
    assert {"job-name=dab-run", "nodes=2", "ntasks-per-node=1", "exclusive", "no-kill"} <= set(asked)
    assert not [line for line in asked if line.startswith("gpus")]


def test_gpus_are_asked_for_on_each_node(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, cluster={"num_workers": 16, "gpus_per_worker": 1}))
    text = script_of(config, num_nodes=2, gpus_per_node=8)
    assert "gpus-per-node=8" in directives(text)
    assert assigned(text, "gpus") == "8"


@pytest.mark.parametrize("name", ["run", NASTY, "-n", "é ü", "a" * 100])
def test_the_script_is_bash_whatever_the_run_is_called(name: str, tmp_path: Path) -> None:
    text = script_of(load_config(write_config(tmp_path, name=name)))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, capture_output=True)
    assert yaml.safe_load(assigned(text, "config"))["name"] == name
    assert list(tmp_path.iterdir()) == [tmp_path / "run.yaml"]


def test_a_name_is_no_directive(tmp_path: Path) -> None:
    asked = directives(script_of(load_config(write_config(tmp_path, name=NASTY))))
    assert not [line for line in asked if line.startswith("uid")]
    assert "job-name=dab-it-s-touch-pwned-id-x-SBATCH---uid-0" in asked


def test_folders_with_spaces_and_quotes_stay_one_word(tmp_path: Path) -> None:
    text = script_of(load_config(write_config(tmp_path)), folder="/shared/a b'c $d")
    assert assigned(text, "program") == "/opt/it's here/bin"
    assert assigned(text, "home") == "/shared/a b'c $d"


def test_the_script_holds_the_configuration_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.sh"
    write_script(write_config(tmp_path), ["train.epochs=3"], num_nodes=2, gpus_per_node=0, output=file)
    held = yaml.safe_load(assigned(file.read_text(), "config"))
    assert held["data"]["train"] == str(tmp_path / "shards")
    assert held["train"]["epochs"] == 3


def test_ray_needs_a_token_that_only_its_owner_can_read(tmp_path: Path) -> None:
    text = script_of(load_config(write_config(tmp_path)))
    lines = [line.strip() for line in text.splitlines()]
    assert lines.index("umask 077") < next(
        i for i, line in enumerate(lines) if line.endswith('>"$RAY_AUTH_TOKEN_PATH"')
    )
    assert 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token"' in lines
    assert not [line for line in lines if "ray " in line and "token" in line.lower()]


def test_the_script_is_printed_without_an_output(tmp_path: Path) -> None:
    data, text = write_script(write_config(tmp_path), [], num_nodes=3, gpus_per_node=0, output=None)
    assert data["file"] is None
    assert data["script"] == text
    assert json.dumps(data)


def test_workers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, cluster={"num_workers": 4, "gpus_per_worker": 1}, data={"train": "x", "batch_size": 64}
    )
    with pytest.raises(InvalidInputError, match=r"^cluster.num_workers: 4 workers x 1 GPUs do not fit on 2 nodes"):
        write_script(config, [], num_nodes=2, gpus_per_node=1, output=None)


def test_gpus_that_nothing_uses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^--gpus-per-node: 8 would stand idle"):
        write_script(write_config(tmp_path), [], num_nodes=2, gpus_per_node=8, output=None)
