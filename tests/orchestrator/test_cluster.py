import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from dabnn.errors import DabError, InvalidInputError
from orchestrator import cluster as clusters
from orchestrator.cluster import Cluster
from orchestrator.home import home
from orchestrator.jobs_api import job_client, job_status
from orchestrator.target import embedded

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

pytestmark = pytest.mark.cluster

START = "from orchestrator.cluster import ensure_cluster; print('pid', ensure_cluster().pid)"
# A job that leaves a process in a session of its own.
JOB = """
import os, subprocess, ray
ray.init()
print("sum", ray.get(ray.remote(lambda x: x + 1).remote(41)), "token", os.environ["RAY_AUTH_MODE"], flush=True)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print("child", child.pid, flush=True)
child.wait()
"""


@pytest.fixture(scope="module", autouse=True)
def own_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAB_HOME", folder)
        patch.setenv("HOME", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def cluster(own_home: Path) -> Iterator[Cluster]:
    """One cluster, asked for by two programs at the same time, in the presence of settings for another Ray."""
    env = os.environ | {"RAY_ADDRESS": "192.0.2.1:6379", "RAY_AUTH_TOKEN": "wrong"}
    starters = [subprocess.Popen([sys.executable, "-c", START], stdout=subprocess.PIPE, env=env) for _ in range(2)]
    printed = [starter.communicate()[0] for starter in starters]
    running = clusters.find_cluster()
    assert running is not None
    assert printed == [f"pid {running.pid}\n".encode()] * 2
    yield running
    clusters.cluster_down()


def wait_for_text(client: "JobSubmissionClient", job: str, text: str) -> str:
    deadline = time.monotonic() + 60
    while text not in (log := str(client.get_job_logs(job))):
        assert time.monotonic() < deadline, log
        time.sleep(0.3)
    return log


def http_status(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_two_programs_at_once_start_one_cluster_that_outlives_them(cluster: Cluster) -> None:
    assert clusters.ensure_cluster() == cluster
    status = clusters.cluster_status()
    assert status.state == "running"
    assert cluster.pid in status.pids
    assert os.getsid(cluster.pid) == cluster.pid


def test_at_least_four_cpus_are_handed_out(cluster: Cluster) -> None:
    assert cluster.num_cpus == max(4, len(os.sched_getaffinity(0)))


def test_a_request_without_the_token_is_refused(cluster: Cluster) -> None:
    jobs = f"{cluster.dashboard_url}/api/jobs/"
    assert http_status(jobs, None) == 401
    assert http_status(jobs, "0" * 64) == 403
    assert http_status(jobs, cluster.token_path.read_text()) == 200


def test_the_token_is_private_and_lies_in_our_folder_alone(cluster: Cluster, own_home: Path) -> None:
    assert cluster.token_path == own_home / "ray_token"
    assert cluster.token_path.stat().st_mode & 0o777 == 0o600
    assert not (own_home / ".ray").exists()


def test_the_dashboard_listens_on_loopback_only(cluster: Cluster) -> None:
    port = int(cluster.dashboard_url.rpartition(":")[2])
    listening = [connection for connection in psutil.net_connections("tcp") if connection.status == psutil.CONN_LISTEN]
    assert {connection.laddr[:1] for connection in listening if connection.laddr[1:] == (port,)} == {("127.0.0.1",)}


def test_another_port_than_that_of_the_running_cluster_is_refused(cluster: Cluster) -> None:
    with pytest.raises(
        InvalidInputError, match=r"^cluster port: 30000 was asked for, but the cluster already runs on "
    ):
        clusters.ensure_cluster(port=30000)


def test_down_ends_jobs_and_what_they_started_and_keeps_the_logs(
    cluster: Cluster, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_home / "job.py").write_text(JOB)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    client = job_client(embedded(cluster))
    assert os.environ["RAY_ADDRESS"] == "192.0.2.1:6379"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
    job = client.submit_job(entrypoint=f"exec python {own_home / 'job.py'}")
    log = wait_for_text(client, job, "child")
    assert "sum 42 token token" in log
    child = int(log.rpartition("child ")[2])
    ours = [psutil.Process(pid) for pid in clusters.cluster_status().pids if psutil.pid_exists(pid)]
    assert psutil.Process(child) in ours

    assert clusters.cluster_down()
    assert not [process for process in ours if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert clusters.cluster_status() == clusters.ClusterStatus("stopped", None, ())
    assert not cluster.session_folder.exists()
    assert f"child {child}" in (own_home / "logs" / "ray-session" / f"job-driver-{job}.log").read_text()
    with pytest.raises(DabError, match=r"^the Ray cluster: its Jobs API at .* does not answer"):
        job_status(embedded(cluster), job)
    assert not clusters.cluster_down()


def test_a_cluster_that_fails_to_start_shows_its_log_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters.cluster_down()
    before = set(Path(tempfile.gettempdir()).glob("dab-ray-*"))
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", "{")
    with pytest.raises(DabError, match=r"(?s)^the Ray cluster: ended while it started.*logs/ray.log.*JSON"):
        clusters.ensure_cluster()
    assert not (home() / "cluster.json").exists()
    assert set(Path(tempfile.gettempdir()).glob("dab-ray-*")) == before


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InvalidInputError, match=rf"^cluster dashboard_port: {port} is taken by "):
            clusters.ensure_cluster(dashboard_port=port)
    with pytest.raises(InvalidInputError, match=r"^cluster port: 12345 lies in 10002-19999"):
        clusters.ensure_cluster(port=12345)
    assert not (home() / "cluster.json").exists()


def test_a_record_of_a_dead_cluster_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    dead = {"title": "t", "pid": os.getpid(), "created_at": 1.0, "marker": "none", "log": "x"}
    details = {"port": 1, "dashboard_port": 2, "num_cpus": 4, "session_folder": str(folder)}
    (home() / "cluster.json").write_text(json.dumps(dead | {"details": details}))
    assert clusters.find_cluster() is None
    assert not clusters.cluster_down()
    assert not folder.exists()
    assert not (home() / "cluster.json").exists()
