"""The registry on a real tracker: real runs of the real loop, and the server that MLflow makes of a version."""

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

import cli
from dabnn.distributed import World
from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from dabnn.train import train
from orchestrator import deliver, tracking
from orchestrator.config import load_config, to_dict
from orchestrator.config_search import Objective
from orchestrator.job import Job
from orchestrator.mlflow_client import unchecked_client
from orchestrator.model_folder import example_image
from orchestrator.processes import free_ports
from orchestrator.registry import (
    Entry,
    check_finished,
    check_names,
    front_aliases,
    model_name,
    register,
    register_front,
)
from orchestrator.resolve import resolve, train_spec

ROOT = Path(__file__).parents[2]
NOBODY = "http://127.0.0.1:9"
START_LIMIT_S = 180
ACCURATE, SMALL = Objective(metric="val_top1"), Objective(metric="packed_bytes")


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAB_HOME", folder)
        yield tracking.ensure_tracking()
        tracking.tracking_down()


@pytest.fixture(scope="module")
def runs(uri: str, small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Two finished runs that differ in their learning rate."""
    root = tmp_path_factory.mktemp("runs")
    return [real_run(uri, small_digits, root / f"rate-{rate:g}", rate) for rate in (2e-3, 2e-2)]


def real_run(uri: str, data: Path, root: Path, rate: float) -> Job:
    changes = [f"data.train={data}", f"data.val={data}", "train.epochs=1", "model.width=0.0625", f"optim.max_lr={rate}"]
    config = resolve(load_config(ROOT / "examples" / "digits.yaml", [*changes, "cluster.num_workers=1"]))
    tags = {"dab.kind": "train", "dab.folder": str(root), "dab.data_digest": "ab" * 32, "dab.git_commit": "c0ffee"}
    run_id = tracking.create_run(uri, "registry", root.name, params={}, tags=tags)
    root.mkdir()
    job = Job("train", run_id, root.name, str(root), uri, "registry", 1, to_dict(config))
    job.save()
    assert train(train_spec(config), RunFolder(root), world=World.current()).status == "finished"
    tracking.set_status(uri, run_id, "finished")
    return job


def entry(job: Job, **metrics: float) -> Entry:
    return Entry(job.run_id, job.run_folder, metrics, job.name)


def versions(uri: str, model: str) -> list[Any]:
    return list(unchecked_client(uri).search_model_versions(f"name = '{model}'"))


def test_a_file_of_a_run_is_registered_once(uri: str, runs: list[Job]) -> None:
    made = register(uri, runs[0].run_id, runs[0].run_folder, model="once", aliases=["best"], tags={"sweep": "5"})
    assert (made.name, made.version, made.uri, made.is_new) == ("once", "1", "models:/once/1", True)
    again = register(uri, runs[0].run_id, runs[0].run_folder, model="once", aliases=["production"])
    assert (again.version, again.is_new) == ("1", False)
    client = unchecked_client(uri)
    (known,) = versions(uri, "once")
    assert known.run_id == runs[0].run_id
    assert client.get_model_version_by_alias("once", "best").version == known.version
    assert client.get_model_version_by_alias("once", "production").version == known.version
    expected = {"run_id": runs[0].run_id, "data_digest": "ab" * 32, "git_commit": "c0ffee", "sweep": "5"}
    assert known.tags == known.tags | expected
    assert {"val_top1", "packed_top1", "packed_bytes", "sha256", "package"} <= known.tags.keys()
    assert len(client.search_logged_models([client.get_run(runs[0].run_id).info.experiment_id])) == 1


@pytest.mark.parametrize("call", ["create_logged_model", "log_model_artifacts", "create_model_version"])
@pytest.mark.parametrize("is_done", [False, True])
def test_a_call_that_breaks_off_anywhere_leaves_one_version(
    uri: str, runs: list[Job], call: str, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, model = runs[0], f"broken-{call}-{is_done}"
    client = unchecked_client(uri)
    experiment_id = client.get_run(job.run_id).info.experiment_id
    for logged in client.search_logged_models([experiment_id], f"source_run_id = '{job.run_id}'"):
        client.delete_logged_model(logged.model_id)
    real: Callable[..., Any] = getattr(MlflowClient, call)
    broken: list[bool] = []

    def breaking(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
        if broken:
            return real(client, *arguments, **named)
        broken.append(True)
        if is_done:
            real(client, *arguments, **named)
        raise MlflowException("the answer was lost")

    monkeypatch.setattr(MlflowClient, call, breaking)
    register(uri, job.run_id, job.run_folder, model=model)
    assert broken
    assert len(versions(uri, model)) == 1
    models = client.search_logged_models([experiment_id], f"source_run_id = '{job.run_id}'")
    assert [each.status.value for each in models] == ["READY"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{number}.png" for number in range(40)]
    for number, file in enumerate(files):
        Image.fromarray((load_digits().images[number] * 15).astype("uint8")).save(file)
    return files


@pytest.fixture(scope="module")
def served(uri: str, runs: list[Job], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of MLflow's server of a version, and the version's folder."""
    made = register(uri, runs[1].run_id, runs[1].run_folder, model="served")
    folder = tmp_path_factory.mktemp("served")
    port = free_ports(1)[0]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow looks for uvicorn there
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"MLFLOW_TRACKING_URI": uri, "PATH": path}
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", made.uri, "--env-manager", "local"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_up(process, f"http://127.0.0.1:{port}/ping", folder / "log")
        yield f"http://127.0.0.1:{port}/invocations", folder
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_up(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def ask(url: str, request: object) -> tuple[int, Any]:
    data = request if isinstance(request, bytes) else json.dumps(request).encode()
    post = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(post, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def rows(images: list[bytes]) -> dict[str, object]:
    return {"dataframe_records": [{"image": base64.b64encode(image).decode()} for image in images]}


def seen_by_dab(file: Path, images: list[Path]) -> list[tuple[str, float]]:
    predictions, _ = deliver.predict_files(file, images)
    return [(one["classes"][0]["class"], one["classes"][0]["probability"]) for one in predictions]


def answered(body: Any) -> list[tuple[str, Any]]:
    return [(row["class"], pytest.approx(row["probability"], rel=1e-5)) for row in body["predictions"]]


def test_a_served_version_answers_as_dab_predict_does(
    uri: str, served: tuple[str, Path], runs: list[Job], images: list[Path], tmp_path: Path
) -> None:
    url, _ = served
    file = tmp_path / "model.safetensors"
    deliver.export_best(runs[1].run_folder, file, run_id=runs[1].run_id, tags={})
    status, body = ask(url, rows([image.read_bytes() for image in images]))
    assert (status, answered(body)) == (200, seen_by_dab(file, images))
    assert len({name for name, _ in answered(body)}) > 1


def test_a_version_holds_a_request_that_its_server_answers(
    uri: str, served: tuple[str, Path], runs: list[Job], tmp_path: Path
) -> None:
    folder = downloaded(uri, "models:/served/1", tmp_path)
    request = (folder / "serving_input_example.json").read_bytes()
    (tmp_path / "example.png").write_bytes(example_image(16))
    (packed,) = (folder / "artifacts").iterdir()
    status, body = ask(served[0], request)
    assert (status, answered(body)) == (200, seen_by_dab(packed, [tmp_path / "example.png"]))
    assert not [path.name for path in folder.rglob("*") if path.suffix in {".pkl", ".pyc", ".pickle"}]
    assert sorted(path.name for path in (folder / "code").iterdir()) == ["dabnn", "kernels"]


def test_a_bad_request_is_told_which_row_is_wrong(served: tuple[str, Path], images: list[Path]) -> None:
    status, body = ask(served[0], rows([images[0].read_bytes(), b"no image"]))
    assert status == 400
    assert "row 1: no readable image" in body["message"]
    status, body = ask(served[0], {"dataframe_records": [{"picture": "eA=="}]})
    assert status == 400
    assert "image" in body["message"]


def test_requests_at_once_do_not_disturb_each_other(served: tuple[str, Path], images: list[Path]) -> None:
    _, whole = ask(served[0], rows([image.read_bytes() for image in images]))
    found: dict[int, Any] = {}

    def one(number: int) -> None:
        found[number] = ask(served[0], rows([images[number].read_bytes()]))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number][0] for number in range(8)] == [200] * 8
    assert [found[number][1]["predictions"][0]["class"] for number in range(8)] == [
        row["class"] for row in whole["predictions"][:8]
    ]


ALONE = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    refused = {"orchestrator", "jobs", "ray", "optuna", "torchvision", "typer", "webdataset", "onnx", "s3fs"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
from mlflow import pyfunc
import pandas
model = pyfunc.load_model(sys.argv[1])
answer = model.predict(pandas.DataFrame({"image": [open(sys.argv[2], "rb").read()]}))
import dabnn
print(json.dumps([dabnn.__file__, answer["class"][0], answer["probability"][0]]))
"""


def test_a_version_runs_on_its_own_code_and_few_packages(
    uri: str, served: tuple[str, Path], images: list[Path], tmp_path: Path
) -> None:
    folder = downloaded(uri, "models:/served/1", tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", ALONE, str(folder), str(images[0])],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    place, name, probability = json.loads(done.stdout.splitlines()[-1])
    assert Path(place).is_relative_to(folder / "code")
    (packed,) = (folder / "artifacts").iterdir()
    assert seen_by_dab(packed, images[:1]) == [(name, pytest.approx(probability, rel=1e-5))]


def downloaded(uri: str, model: str, place: Path) -> Path:
    code = "import mlflow, sys; print(mlflow.artifacts.download_artifacts(sys.argv[1], dst_path=sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, model, str(place)],
        env=os.environ | {"MLFLOW_TRACKING_URI": uri}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Path(done.stdout.splitlines()[-1])


def test_the_best_trial_of_a_sweep_moves_the_alias(uri: str, runs: list[Job]) -> None:
    first, second = (entry(job, val_top1=value) for job, value in zip(runs, (40.0, 50.0), strict=True))
    for best in (first, second):
        register_front(uri, "5" * 32, [best], [ACCURATE], model="single", say=quiet)
    client = unchecked_client(uri)
    assert client.get_model_version_by_alias("single", "best").run_id == second.run_id
    assert {each.tags["sweep"] for each in versions(uri, "single")} == {"5" * 32}
    assert not any("front" in each.tags for each in versions(uri, "single"))


def test_a_front_is_tagged_and_who_is_beaten_leaves_it(uri: str, runs: list[Job]) -> None:
    accurate, small = (
        entry(job, val_top1=top1, packed_bytes=size, latency_ms=0.25)
        for job, top1, size in zip(runs, (50, 40), (9, 5), strict=True)
    )
    goals = [ACCURATE, SMALL, Objective(metric="latency_ms")]
    made = register_front(uri, "6" * 32, [accurate, small], goals, model="front", say=quiet)
    assert [version.aliases for version in made] == [("most-accurate", "fastest"), ("smallest",)]
    assert [version.tags["latency_ms"] for version in made] == ["0.25"] * 2
    assert all(int(version.tags["packed_bytes"]) > 9 for version in made)  # what the file has, not what was told
    assert [each.tags.get("front") for each in versions(uri, "front")] == ["6" * 32] * 2
    register_front(uri, "6" * 32, [small], goals, model="front", say=quiet)
    assert {each.run_id: each.tags.get("front") for each in versions(uri, "front")} == {
        accurate.run_id: None,
        small.run_id: "6" * 32,
    }
    assert unchecked_client(uri).get_model_version_by_alias("front", "most-accurate").run_id == small.run_id


def test_a_trial_that_cannot_be_registered_does_not_keep_the_others_from_it(
    uri: str, runs: list[Job], tmp_path: Path
) -> None:
    said: list[str] = []
    gone = Entry("", RunFolder(tmp_path), {"val_top1": 90.0, "packed_bytes": 1.0}, "t07")
    good = entry(runs[0], val_top1=50, packed_bytes=9)
    made = register_front(uri, "7" * 32, [gone, good], [ACCURATE, SMALL], model="some", say=said.append)
    assert [version.version for version in made] == ["1"]
    assert any(line.startswith("t07 was not registered: it has no run in MLflow") for line in said)
    with pytest.raises(DabError, match=r"^t07 was not registered"):
        register_front(uri, "7" * 32, [gone], [ACCURATE], model="none", say=quiet)


def test_a_tracker_that_is_away_is_told_as_such(runs: list[Job]) -> None:
    with pytest.raises(DabError, match=r"^MLflow: no answer from http://127\.0\.0\.1:9"):
        register_front(NOBODY, "8" * 32, [entry(runs[0], val_top1=1)], [ACCURATE], model="away", say=quiet)


def test_aliases_say_what_a_version_is_best_at() -> None:
    odd = [Objective(metric="latency_ms"), Objective(metric="conv2/flips", mode="max"), ACCURATE]
    entries = [
        Entry("1", RunFolder(Path("a")), {"val_top1": 50, "latency_ms": 2, "conv2/flips": 1}),
        Entry("2", RunFolder(Path("b")), {"val_top1": 50, "latency_ms": 1}),
    ]
    assert front_aliases(entries, odd) == [["best-conv2-flips", "most-accurate"], ["fastest"]]
    assert front_aliases(entries, [ACCURATE]) == [["best"], []]


@pytest.mark.parametrize(
    ("text", "name"),
    [("digits", "digits"), ("a/b:c", "a-b-c"), ('it\'s "x"', "it-s -x"), ("../..", "model"), ("", "model")],
)
def test_names_of_models_are_those_that_mlflow_takes(text: str, name: str) -> None:
    assert model_name(text) == name
    check_names(name, [])


@pytest.mark.parametrize(
    ("model", "alias", "expected"),
    [
        ("a/b", "best", r"--model: 'a/b' is no name of a registered model; .* such as a-b\."),
        (None, "latest", r"--alias: 'latest' is no alias"),
        (None, "V3", r"--alias: 'V3' is no alias"),
        (None, "the best", r"--alias: 'the best' is no alias"),
        (None, "", r"--alias: '' is no alias"),
    ],
)
def test_a_name_that_mlflow_would_refuse_is_refused_first(model: str | None, alias: str, expected: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{expected}"):
        check_names(model, [alias])


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({}, r".*: the run has not finished, so there is nothing to register yet\."),
        ({"status": "failed", "message": "out of room"}, r".*: the run ended as failed \(out of room\), and only what"),
        ({"status": "stopped"}, r".*: the run ended as stopped, and only what has finished is registered\."),
    ],
)
def test_a_run_that_has_not_finished_is_refused(result: dict[str, str], expected: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    if result:
        folder.write_result(result)
    with pytest.raises(InvalidInputError, match=f"^{expected}"):
        check_finished(folder)


def test_dab_register_names_the_version_and_how_to_serve_it(
    uri: str, runs: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    arguments = ["register", runs[0].run_id, "--model", "command", "--alias", "one", "--alias", "two"]
    assert cli.run([*arguments, "--tracking-uri", uri, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["version"], found["uri"]) == ("command", "1", "models:/command/1")
    assert (found["aliases"], found["is_new"]) == (["one", "two"], True)
    assert cli.run([*arguments, "--tracking-uri", uri]) == 0
    shown = capsys.readouterr()
    assert "models:/command/1" in shown.out
    assert f"MLFLOW_TRACKING_URI={uri} mlflow models serve -m models:/command/1 --env-manager local" in shown.err


def test_dab_register_of_a_run_that_goes_on_is_refused(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = {"dab.kind": "train", "dab.folder": str(tmp_path)}
    run_id = tracking.create_run(uri, "registry", "goes-on", params={}, tags=tags)
    assert cli.run(["register", run_id, "--tracking-uri", uri]) == 2
    assert "the run has not finished" in capsys.readouterr().err
