import json
import logging
import math
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from gate import gate
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import RestException
from s3_server import S3Server

from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator import processes, tracking
from orchestrator.commands import show_status
from orchestrator.home import home
from orchestrator.mlflow_client import is_refusal, unchecked_client

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module", autouse=True)
def own_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dab -") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAB_HOME", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def uri(own_home: Path) -> Iterator[str]:
    yield tracking.ensure_tracking()
    tracking.tracking_down()


@pytest.fixture
def run_id(uri: str, request: pytest.FixtureRequest) -> str:
    return tracking.create_run(uri, "test", request.node.name, params={}, tags={})


@pytest.fixture
def follower(uri: str) -> Iterator[tracking.MetricFollower]:
    running = tracking.MetricFollower(uri, poll_s=0.05)
    yield running
    running.close(timeout_s=10)


def report(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "metrics": metrics, "wall_time": 1.7e9 + time.monotonic()}) + "\n"


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in unchecked_client(uri).get_metric_history(run_id, key)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_second_call_finds_the_server_that_runs(uri: str) -> None:
    assert tracking.ensure_tracking() == uri
    status = tracking.tracking_status()
    assert (status.state, status.uri) == ("running", uri)
    assert 2 <= len(status.pids) <= 3  # none of the seven that MLflow adds by default


def test_the_load_of_the_machine_is_followed_beside_the_metrics_of_a_run(
    uri: str, run_id: str, follower: tracking.MetricFollower, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    follower.follow(folder, run_id)
    folder.append_metrics(1, {"loss": 0.5})
    folder.append_system(30, {"system/cpu_utilization_percentage": 12.5})
    wait_until(lambda: len(tracking.find_run(uri, run_id).metrics) == 2)
    assert history(uri, run_id, "system/cpu_utilization_percentage") == [(30, 12.5)]
    assert history(uri, run_id, "loss") == [(1, 0.5)]
    folder.system_file.unlink()  # begun anew on another machine: time goes on
    folder.append_system(20, {"system/cpu_utilization_percentage": 50.0})
    folder.append_system(40, {"system/cpu_utilization_percentage": 60.0})
    wait_until(lambda: len(history(uri, run_id, "system/cpu_utilization_percentage")) == 2)
    assert history(uri, run_id, "system/cpu_utilization_percentage") == [(30, 12.5), (40, 60.0)]


def test_the_server_listens_on_loopback_only(uri: str) -> None:
    port = int(uri.rpartition(":")[2])
    listening = [connection for connection in psutil.net_connections("tcp") if connection.status == psutil.CONN_LISTEN]
    assert {connection.laddr[:1] for connection in listening if connection.laddr[1:] == (port,)} == {("127.0.0.1",)}


def test_another_port_than_that_of_the_running_server_is_refused(uri: str) -> None:
    with pytest.raises(
        InvalidInputError, match=r"^tracking port: 30000 was asked for, but the server already runs on "
    ):
        tracking.ensure_tracking(port=30000)


def test_a_run_is_recorded_whole(uri: str, tmp_path: Path) -> None:
    params: dict[str, object] = {
        "model": {"name": "bincifar", "width": 0.25},
        "none": None,
        "list": [1, 2],
        "long": "x" * 7000,
    }
    params |= {f"p{index}": index for index in range(150)}
    run_id = tracking.create_run(uri, "whole", "$(touch x) 'quoted'", params=params, tags={"kind": "train"})
    record = tracking.find_run(uri, run_id)
    assert (record.name, record.status, record.experiment) == ("$(touch x) 'quoted'", "queued", "whole")
    assert (record.parent, record.end_time, record.tags["kind"]) == (None, None, "train")
    assert (
        record.params | {"model.name": "bincifar", "model.width": "0.25", "none": "null", "list": "[1, 2]"}
        == record.params
    )
    assert len(record.params["long"]) == 6000
    assert record.params["long"].endswith("cut by dab from 7000 characters")
    assert record.params["p149"] == "149"

    tracking.set_tags(uri, run_id, {"message": ""})
    tracking.log_metrics(uri, run_id, {"loss": 0.5, "top1": math.nan}, step=3)
    tracking.log_json(uri, run_id, "config.json", {"a": 1})
    (tmp_path / "model.bin").write_bytes(b"\0\1")
    tracking.log_file(uri, run_id, tmp_path / "model.bin", "files")
    data = [tracking.DataInput("/data/digits/", split, "ab" * 32, 5, 99, 3) for split in ("train", "val")]
    tracking.log_inputs(uri, run_id, data)
    record = tracking.find_run(uri, run_id)
    assert (record.metrics["loss"], record.tags["message"]) == (0.5, "")
    folder = home() / "artifacts" / record.artifact_uri.removeprefix("mlflow-artifacts:/")
    assert json.loads((folder / "config.json").read_text()) == {"a": 1}
    assert (folder / "files" / "model.bin").read_bytes() == b"\0\1"
    inputs = unchecked_client(uri).get_run(run_id).inputs
    assert inputs is not None
    shown = {one.dataset.name: (one.dataset, one.tags[0].value) for one in inputs.dataset_inputs}
    assert {name: context for name, (_, context) in shown.items()} == {"digits/train": "train", "digits/val": "val"}
    dataset, _ = shown["digits/val"]
    assert (dataset.digest, json.loads(dataset.source)) == (("ab" * 32)[:36], {"uri": "/data/digits/manifest.json"})
    profile = {"num_rows": 5, "num_classes": 3, "num_bytes": 99, "manifest_sha256": "ab" * 32}
    assert json.loads(str(dataset.profile)) == profile


@pytest.mark.parametrize("status", ["queued", "running", "finished", "failed", "stopped"])
def test_every_status_comes_back_and_only_an_end_has_an_end_time(
    uri: str, run_id: str, status: tracking.Status
) -> None:
    tracking.set_status(uri, run_id, "failed")
    tracking.set_status(uri, run_id, status)
    record = tracking.find_run(uri, run_id)
    assert record.status == status
    assert (record.end_time is not None) == (status in ("finished", "failed", "stopped"))


def test_a_run_is_found_by_id_prefix_and_name_but_not_by_what_fits_two(uri: str) -> None:
    first, second = (tracking.create_run(uri, "twins", "twin-run", params={}, tags={}) for _ in range(2))
    alone = tracking.create_run(uri, "twins", "single%_run", params={}, tags={}, parent=first)
    assert tracking.find_run(uri, "single%_run").run_id == alone
    assert tracking.find_run(uri, alone[:12]).run_id == alone
    with pytest.raises(InvalidInputError, match=r"^run: 'twin-run' fits 2 runs: ") as error:
        tracking.find_run(uri, "twin-run")
    assert first in str(error.value)
    assert second in str(error.value)
    with pytest.raises(
        InvalidInputError, match=r"^run: none on .* has the name or id 'twin-rum'\. Nearest: twin-run\."
    ):
        tracking.find_run(uri, "twin-rum")
    assert [run.run_id for run in tracking.find_runs(uri, "twins", parent=first)] == [alone]
    assert len(tracking.find_runs(uri, "twins")) == 3
    assert len(tracking.find_runs(uri, max_results=2)) == 2
    with pytest.raises(InvalidInputError, match=r"^experiment: there is none named 'twin' on .* Nearest: twins\."):
        tracking.find_runs(uri, "twin")


def test_an_unknown_run_is_a_refusal_in_the_words_of_the_server(uri: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^MLflow: {uri} answered: .*not found"):
        tracking.set_tags(uri, "0" * 32, {"a": "b"})


def test_a_server_that_is_away_is_named_at_once() -> None:
    with pytest.raises(DabError, match=f"^MLflow: no answer from {NOBODY};.*tracking.uri"):
        tracking.find_runs(NOBODY)


def test_a_server_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.mlflow_client._REACH_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DabError, match=f"^MLflow: no answer from {address}"):
            tracking.check_tracking(address)


@pytest.mark.parametrize(
    ("code", "is_final"),
    [("INVALID_PARAMETER_VALUE", True), ("RESOURCE_DOES_NOT_EXIST", True), ("BAD_REQUEST", False)],
)
def test_failures_of_the_servers_database_are_no_refusals(code: str, is_final: bool) -> None:
    error = RestException({"error_code": code, "message": "QueuePool limit of size 5 overflow 10 reached"})
    assert is_refusal(error) == is_final


@pytest.mark.parametrize("address", ["sqlite:///x.db", "./mlruns", "http://"])
def test_a_store_that_is_no_server_is_refused(address: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^tracking.uri: .* is not the address of an MLflow server"):
        tracking.check_tracking(address)


def test_lines_are_sent_as_they_appear_and_replayed_steps_once(
    uri: str, run_id: str, follower: tracking.MetricFollower, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    follower.follow(path, run_id)
    append(path, report(0, loss=1.0) + report(0, top1=0.1) + report(1, loss=0.5))
    wait_until(lambda: len(history(uri, run_id, "loss")) == 2)
    append(path, report(1, loss=0.5) + report(2, loss=0.25) + '{"step": 3, "metr')
    wait_until(lambda: len(history(uri, run_id, "loss")) == 3)
    append(path, report(3, loss=0.125).removeprefix('{"step": 3, "metr'))
    assert follower.close(timeout_s=10) == 0
    assert history(uri, run_id, "loss") == [(0, 1.0), (1, 0.5), (2, 0.25), (3, 0.125)]
    assert history(uri, run_id, "top1") == [(0, 0.1)]


def test_the_instruments_of_a_deep_network_arrive_in_few_calls(
    uri: str, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def note_size(self: MlflowClient, run_id: str, metrics: Sequence[Metric] = (), **more: object) -> None:
        sizes.append(len(metrics))
        log_batch(self, run_id, metrics, **more)

    log_batch = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", note_size)
    keys = [f"layers/{layer:02d}/{what}" for layer in range(1, 54) for what in ("flipped_share", "gap", "dead_filters")]
    path = tmp_path / "metrics.jsonl"
    append(path, "".join(report(epoch, **dict.fromkeys(keys, epoch / 8)) for epoch in range(1, 21)))
    running = tracking.MetricFollower(uri)
    running.follow(path, run_id)
    assert running.close(timeout_s=30) == 0
    assert sizes == [1000, 1000, 1000, 180]
    assert set(tracking.find_run(uri, run_id).metrics) == set(keys)
    assert history(uri, run_id, "layers/53/gap") == [(epoch, epoch / 8) for epoch in range(1, 21)]


def test_a_person_sees_the_metrics_of_the_run_and_a_program_those_of_the_layers_too(uri: str, tmp_path: Path) -> None:
    metrics = {"val_top1": 81.25, "layers/02/flipped_share": 0.001, "layers/02/gap": 0.5}
    append(tmp_path / "metrics.jsonl", report(1, **metrics))
    run_id = tracking.create_run(uri, "test", "measured", params={}, tags={"dab.folder": str(tmp_path)})
    tracking.set_status(uri, run_id, "finished")
    data, text = show_status(uri, run_id, lambda _: None)
    assert "metrics: val_top1 81.25\n" in text
    assert "layers/" not in text
    assert isinstance(data, dict)
    assert data["metrics"] == metrics


def test_metrics_of_a_run_in_a_store_are_followed_there(
    uri: str, run_id: str, follower: tracking.MetricFollower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        follower.follow(RunFolder.of("s3://bucket/run"), run_id)
        path = server.objects / "run/metrics.jsonl"
        path.parent.mkdir(parents=True)
        append(path, report(0, loss=1.0))
        wait_until(lambda: len(history(uri, run_id, "loss")) == 1)
        follower.rest(run_id)
        num_requests = len(server.requests())
        time.sleep(2.5)
        assert len(server.requests()) <= num_requests + 3  # what was under way


def test_a_call_that_breaks_stops_neither_the_follower_nor_what_comes_after(
    uri: str, run_id: str, follower: tracking.MetricFollower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking = [True]
    send = tracking.MetricFollower._send

    def send_or_break(self: tracking.MetricFollower, *arguments: Any) -> None:
        if breaking:
            breaking.clear()
            raise KeyError("not foreseen")
        send(self, *arguments)

    monkeypatch.setattr(tracking.MetricFollower, "_send", send_or_break)
    append(tmp_path / "metrics.jsonl", report(0, loss=1.0))
    follower.owe(lambda: [][0])
    follower.follow(tmp_path / "metrics.jsonl", run_id)
    assert follower.close(timeout_s=30) == 0
    assert not breaking
    assert history(uri, run_id, "loss") == [(0, 1.0)]


def test_calls_that_are_owed_are_waited_for_as_long_as_they_are_made(uri: str) -> None:
    made: list[int] = []

    def make() -> None:
        time.sleep(0.4)
        made.append(1)

    follower = tracking.MetricFollower(uri, poll_s=0.05)
    for _ in range(5):
        follower.owe(make)
    follower.settle(stall_s=1.0)
    assert len(made) == 5

    def refuse() -> None:
        raise DabError("away")

    follower.owe(refuse)
    began = time.monotonic()
    follower.settle(stall_s=0.5)
    assert 0.5 <= time.monotonic() - began < 5
    follower.close(timeout_s=0.1)


def test_the_thread_of_a_follower_has_nothing_to_import() -> None:
    program = (
        "import sys, threading; threading.Thread.start = lambda self: None\n"
        "from orchestrator.metric_follower import MetricFollower; MetricFollower('http://127.0.0.1:9')\n"
        "assert {'mlflow.tracking', 'mlflow.entities', 'mlflow.exceptions'} <= set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_later_follower_goes_on_where_the_first_ended(uri: str, run_id: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, "".join(report(step, loss=float(step)) for step in range(2500)))
    first = tracking.MetricFollower(uri)
    first.follow(path, run_id)
    assert first.close(timeout_s=30) == 0
    append(path, report(2499, loss=2499.0) + report(2500, loss=2500.0))
    second = tracking.MetricFollower(uri)
    second.follow(path, run_id)
    assert second.close(timeout_s=30) == 0
    assert [step for step, _ in history(uri, run_id, "loss")] == list(range(2501))


def test_a_follower_killed_between_sending_and_noting_it_doubles_nothing(uri: str, run_id: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, report(0, loss=1.0) + report(1, loss=math.nan))
    for _ in range(2):
        follower = tracking.MetricFollower(uri)
        follower.follow(path, run_id)
        assert follower.close(timeout_s=30) == 0
        path.with_name("metrics.jsonl.sent").unlink()
    assert [step for step, _ in history(uri, run_id, "loss")] == [0, 1]


def test_a_damaged_line_and_a_deleted_run_stop_no_other(
    uri: str, run_id: str, follower: tracking.MetricFollower, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, lost = tmp_path / "good.jsonl", tmp_path / "lost.jsonl"
    append(lost, report(0, loss=1.0))
    append(good, "garbage\n[1]\n" + report(0, loss=1.0))
    follower.follow(lost, "0" * 32)
    follower.follow(good, run_id)
    assert follower.close(timeout_s=30) == 1
    assert history(uri, run_id, "loss") == [(0, 1.0)]
    assert sum("is no report of metrics" in message for message in caplog.messages) == 2
    assert sum("takes no metrics of run" in message for message in caplog.messages) == 1


def test_close_counts_what_could_not_be_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, report(0, loss=1.0) + report(1, loss=0.5) + '{"st')
    follower = tracking.MetricFollower(NOBODY, poll_s=0.05)
    follower.follow(path, "0" * 32)
    begin = time.monotonic()
    assert follower.close(timeout_s=1) == 2
    assert time.monotonic() - begin < 5
    assert sum("is away" in message for message in caplog.messages) <= 1


def test_metrics_written_while_the_server_is_dead_arrive_when_it_is_back(
    uri: str, run_id: str, follower: tracking.MetricFollower, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    follower.follow(path, run_id)
    append(path, report(0, loss=1.0))
    wait_until(lambda: len(history(uri, run_id, "loss")) == 1)
    caplog.set_level(logging.WARNING)
    server = processes.recorded(home() / "tracking.json")
    assert server is not None
    for process in processes.members(server):
        process.kill()
    append(path, report(1, loss=0.5))
    wait_until(lambda: any("is away" in message for message in caplog.messages))
    append(path, report(2, loss=0.25))

    assert tracking.ensure_tracking() == uri
    assert follower.close(timeout_s=40) == 0
    assert history(uri, run_id, "loss") == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert sum("is away" in message for message in caplog.messages) == 1


def test_a_batch_whose_answer_was_lost_is_not_doubled_even_by_another_follower(
    uri: str, run_id: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, "".join(report(step, loss=1 / (step + 3), top1=math.nan) for step in range(40)))
    with gate(uri) as door:
        door.num_to_lose = 1
        first = tracking.MetricFollower(door.uri, poll_s=0.05)
        first.follow(path, run_id)
        wait_until(lambda: door.num_lost == 1)
        door.is_open = False  # the server has the batch, and the follower dies without knowing
        assert first.close(timeout_s=0.5) == 40
    append(path, "".join(report(step, loss=9.0) for step in range(30, 45)))  # the run was restarted meanwhile
    second = tracking.MetricFollower(uri)
    second.follow(path, run_id)
    assert second.close(timeout_s=30) == 0
    expected = [(step, 1 / (step + 3)) for step in range(40)] + [(step, 9.0) for step in range(40, 45)]
    assert history(uri, run_id, "loss") == expected
    assert [step for step, _ in history(uri, run_id, "top1")] == list(range(40))


def test_two_followers_of_one_file_send_each_point_once(uri: str, run_id: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, "".join(report(step, loss=float(step)) for step in range(300)))
    append(path, "".join(report(step, loss=float(step)) for step in range(250, 600)))
    both = [tracking.MetricFollower(uri) for _ in range(2)]
    for follower in both:
        follower.follow(path, run_id)
    assert [follower.close(timeout_s=30) for follower in both] == [0, 0]
    assert [step for step, _ in history(uri, run_id, "loss")] == list(range(600))


def test_a_file_that_was_put_back_to_an_earlier_state_is_read_from_its_beginning(
    uri: str, run_id: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = report(0, loss=1.0)
    append(path, kept + report(1, loss=0.5) + report(2, loss=0.25))
    first = tracking.MetricFollower(uri)
    first.follow(path, run_id)
    assert first.close(timeout_s=30) == 0
    path.write_text(kept + "".join(report(step, loss=8.0, more=1.0) for step in range(1, 5)))  # longer than before
    second = tracking.MetricFollower(uri)
    second.follow(path, run_id)
    assert second.close(timeout_s=30) == 0
    assert history(uri, run_id, "loss") == [(0, 1.0), (1, 0.5), (2, 0.25), (3, 8.0), (4, 8.0)]
    assert history(uri, run_id, "more") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0)]


def test_a_run_that_starts_while_the_server_is_away_is_marked_as_running_when_it_is_back(
    uri: str, run_id: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    with gate(uri) as door:
        door.is_open = False
        follower = tracking.MetricFollower(door.uri, poll_s=0.05)
        follower.owe(lambda: tracking.set_tags(door.uri, "0" * 32, {"a": "refused, which holds up nothing"}))
        follower.owe(lambda: tracking.set_status(door.uri, run_id, "running"))
        follower.follow(path, run_id)
        append(path, report(0, loss=1.0))
        time.sleep(0.5)
        assert tracking.find_run(uri, run_id).status == "queued"
        door.is_open = True
        wait_until(lambda: tracking.find_run(uri, run_id).status == "running")
        assert tracking.has_unsent(path, run_id) or history(uri, run_id, "loss")
        assert follower.close(timeout_s=30) == 0
    assert history(uri, run_id, "loss") == [(0, 1.0)]
    assert not tracking.has_unsent(path, run_id)


def test_status_sends_the_metrics_that_an_ended_run_could_not(uri: str, tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", report(1, loss=0.5) + report(2, loss=0.25))
    run_id = tracking.create_run(uri, "test", "ended", params={}, tags={"dab.folder": str(tmp_path)})
    tracking.set_status(uri, run_id, "finished")
    show_status(uri, run_id, lambda _: None)
    assert history(uri, run_id, "loss") == [(1, 0.5), (2, 0.25)]


def test_an_address_with_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidInputError, match=r"^tracking.uri: http://127.0.0.1:9 holds a user or password") as error:
        tracking.check_tracking("http://me:hunter2@127.0.0.1:9")
    assert "hunter2" not in str(error.value)


def test_a_run_whose_creation_was_not_answered_is_created_once(uri: str) -> None:
    with gate(uri) as door:
        door.lossy_path = "/runs/create"
        door.num_to_lose = 1
        run_id = tracking.create_run(door.uri, "created", "once", params={"a": 1}, tags={})
        assert door.num_lost == 1
        door.lossy_path = "/runs/update"
        door.num_to_lose = 2
        tracking.set_status(door.uri, run_id, "running")
        assert door.num_lost == 3
    (record,) = tracking.find_runs(uri, "created")
    assert (record.run_id, record.status, record.params) == (run_id, "running", {"a": "1"})


def test_a_creation_that_failed_half_way_is_gone_on_with(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.mlflow_client._RETRY_DELAYS_S", ())
    with gate(uri) as door:
        door.num_to_lose = 1
        with pytest.raises(DabError):
            tracking.create_run(door.uri, "half", "trial", params={"a": 1}, tags={}, key="sweep-a")
        run_id = tracking.create_run(door.uri, "half", "trial", params={"a": 1}, tags={}, key="sweep-a")
    (record,) = tracking.find_runs(uri, "half")
    assert (record.run_id, record.params) == (run_id, {"a": "1"})


def test_a_database_that_cannot_be_opened_is_told_and_leaves_no_process(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DAB_HOME", str(tmp_path))
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(DabError, match=r"(?s)^the MLflow server: ended while it started.*mlflow.log.*not a database"):
        tracking.ensure_tracking()
    assert tracking.tracking_status() == tracking.TrackingStatus("stopped", None, ())
    assert not (tmp_path / "tracking.json").exists()
    assert (tmp_path / "mlflow.db").exists()


def test_a_start_that_is_interrupted_leaves_neither_process_nor_half_a_database(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DAB_HOME", str(tmp_path))
    seen: list[processes.Server] = []

    def interrupt(_message: str) -> None:
        if (tmp_path / "mlflow.db").exists():
            seen.extend(filter(None, [processes.recorded(tmp_path / "tracking.json")]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracking.ensure_tracking(on_wait=interrupt)
    assert processes.members(seen[0]) == []
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "tracking.json").exists()


def test_down_ends_the_server_and_keeps_what_it_recorded(uri: str) -> None:
    ours = [psutil.Process(pid) for pid in tracking.tracking_status().pids]
    assert tracking.tracking_down()
    assert not [process for process in ours if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not tracking.tracking_down()
    with sqlite3.connect(home() / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone()[0] > 5
    database.close()
