"""The tracking server where other machines reach it, and over PostgreSQL."""

import http.client
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from postgres import postgres
from test_tracking import append, history, report

from dabnn.errors import DabError, InvalidInputError
from orchestrator import tracking
from orchestrator.mlflow_client import unchecked_client
from orchestrator.tracking_settings import tracking_settings

SIGN_IN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        monkeypatch.setenv("DAB_HOME", folder)
        for name in SIGN_IN:
            monkeypatch.setenv(name, "")  # so that what signing in sets is undone
            monkeypatch.delenv(name)
        yield Path(folder)
        tracking.tracking_down()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('hosts = "0.0.0.0"', r"tracking.toml: hosts is unknown; the nearest known key is host\."),
        ("port = true", r"port: True is not a number\."),
        ("password = 1", r"password: 1 is not true or false\."),
        ("allowed_hosts = []", r"allowed_hosts: \[\] is not a list of names\."),
        ('host = "mlflow.lab"', r"host: 'mlflow.lab' is no IPv4 address"),
        ('host = "0.0.0.0"', r"allowed_hosts: missing, but host is 0.0.0.0, which other machines reach"),
        ('host = "0.0.0.0"\nallowed_hosts = ["*"]', r"allowed_hosts: a pattern would let other names in"),
        ('store = "mysql://u:hunter2@h/d"', r"store: mysql://h/d is not postgresql://"),
        ('store = "postgresql://u:hunter2@h/d"', r"store: holds a password, .* into ~/.pgpass"),
        ('store = "postgresql://u@h/d?password=hunter2"', r"store: holds a password"),
        ('artifacts = "s3://key:hunter2@bucket"', r"artifacts: s3://bucket holds a user name, a password"),
        ('artifacts = "s3://bucket?key=hunter2"', r"artifacts: s3://bucket\?\*\*\* holds a user name, a password"),
        ("store = ", r"tracking.toml: cannot be read"),
    ],
)
def test_settings_that_are_wrong_or_unsafe_are_refused(own_home: Path, text: str, message: str) -> None:
    (own_home / "tracking.toml").write_text(text)
    with pytest.raises(InvalidInputError, match=message) as error:
        tracking_settings()
    assert "hunter2" not in str(error.value)


def test_a_server_that_other_machines_reach_lets_nobody_in_without_the_password(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_home / "tracking.toml").write_text('host = "0.0.0.0"\nallowed_hosts = ["mlflow.lab"]\n')
    uri = tracking.ensure_tracking()
    port = int(uri.rpartition(":")[2])
    status = tracking.tracking_status()
    assert status.user == "dab"
    password_file = Path(str(status.password_file))
    password = password_file.read_text()
    secret = [own_home / name for name in ("tracking_password", "tracking_auth.ini", "tracking_users.db")]
    assert password_file in secret
    assert [path.stat().st_mode & 0o777 for path in secret] == [0o600] * 3

    opened = {path: answer(port, method, path) for path in PATHS for method in ("GET", "POST")}
    assert {path for path, code in opened.items() if code not in (401, 403, 405)} <= {"/health"}
    assert answer(port, "GET", "/api/2.0/mlflow/experiments/search", host="evil.example") == 403
    assert answer(port, "GET", "/health", host=f"mlflow.lab:{port}") == 200

    run_id = tracking.create_run(uri, "test", "guarded", params={}, tags={})
    tracking.log_json(uri, run_id, "a.json", {"a": 1})
    append(tmp_path / "metrics.jsonl", report(0, loss=1.0))
    follower = tracking.MetricFollower(uri)
    follower.follow(tmp_path / "metrics.jsonl", run_id)
    assert follower.close(timeout_s=30) == 0
    assert history(uri, run_id, "loss") == [(0, 1.0)]
    unchecked_client("http://127.0.0.1:9")
    assert [name for name in SIGN_IN if name in os.environ] == []  # no other server is told

    command_lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert [line for line in command_lines if password in line] == []
    assert password not in (own_home / "logs" / "mlflow.log").read_text()

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "dab")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(DabError, match=r"asks for a user and a password, and those given are not right"):
        tracking.find_run(uri, run_id)


PATHS = (
    "/",
    "/health",
    "/version",
    "/metrics",
    "/graphql",
    "/signup",
    "/docs",
    "/openapi.json",
    "/api/2.0/mlflow/experiments/search",
    "/api/2.0/mlflow/runs/create",
    "/api/2.0/mlflow/runs/log-batch",
    "/api/2.0/mlflow/users/create",
    "/api/2.0/mlflow-artifacts/artifacts",
    "/api/3.0/mlflow/logged-models/search",
    "/ajax-api/2.0/mlflow/upload-artifact",
    "/ajax-api/3.0/jobs",
    "/ajax-api/3.0/mlflow/assistant/message",
    "/get-artifact",
    "/gateway/routes",
    "/v1/traces",
)


def answer(port: int, method: str, path: str, host: str | None = None) -> int:
    """Return the status that the server answers without credentials."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": host} if host else {})
    code = connection.getresponse().status
    connection.close()
    return code


def write_as_trials(uri: str, folder: Path, num_trials: int, num_lines: int) -> list[str]:
    """Let trials record themselves at once, each with a follower of its own; return their ids."""

    def one(number: int) -> str:
        run_id = tracking.create_run(uri, "trials", f"trial-{number}", params={"number": number}, tags={})
        tracking.set_status(uri, run_id, "running")
        path = folder / f"{number}.jsonl"
        follower = tracking.MetricFollower(uri)
        follower.follow(path, run_id)
        for step in range(num_lines):
            append(path, report(step, loss=number + step / 8, top1=float(step)))
        unsent = follower.close(timeout_s=300)
        tracking.log_json(uri, run_id, "config.json", {"number": number})
        tracking.set_status(uri, run_id, "failed" if unsent else "finished")
        return run_id

    with ThreadPoolExecutor(num_trials) as pool:
        return list(pool.map(one, range(num_trials)))


def check_trials(uri: str, run_ids: list[str], num_lines: int) -> None:
    """Check that nothing of them was lost or doubled."""
    records = {record.run_id: record for record in tracking.find_runs(uri, "trials")}
    assert set(records) == set(run_ids)
    assert {record.status for record in records.values()} == {"finished"}
    for number, run_id in enumerate(run_ids):
        assert history(uri, run_id, "loss") == [(step, number + step / 8) for step in range(num_lines)]
        assert records[run_id].artifact_uri.startswith("mlflow-artifacts:/")  # through the server


def test_trials_that_write_at_once_do_not_lock_each_other_out(tmp_path: Path) -> None:
    uri = tracking.ensure_tracking()
    check_trials(uri, write_as_trials(uri, tmp_path, num_trials=16, num_lines=3), num_lines=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hundreds_of_trials_write_at_once_to_sqlite(tmp_path: Path) -> None:
    uri = tracking.ensure_tracking()
    check_trials(uri, write_as_trials(uri, tmp_path, num_trials=200, num_lines=5), num_lines=5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hundreds_of_trials_write_at_once_to_postgresql_whose_password_shows_nowhere(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres() as database:
        monkeypatch.setenv("PGPASSFILE", str(database.passfile))
        (own_home / "tracking.toml").write_text(f'store = "{database.url}"\n')
        uri = tracking.ensure_tracking()
        check_trials(uri, write_as_trials(uri, tmp_path, num_trials=200, num_lines=5), num_lines=5)
        shown = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
        assert database.password not in shown + (own_home / "logs" / "mlflow.log").read_text()
        assert not (own_home / "mlflow.db").exists()
        tracking.tracking_down()
