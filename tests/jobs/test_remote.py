"""Runs that are sent to a cluster elsewhere: another home than the cluster's, over a link that can be cut."""

import json
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from link import Link
from program import Dab, Done, finish, wait_until
from test_jobs import narrow

from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from orchestrator import cluster_view, tracking
from orchestrator.capacity import Needs
from orchestrator.jobs_api import job_client, job_log, job_status, jobs, stop_job
from orchestrator.package import package
from orchestrator.queue import Waiting, metadata
from orchestrator.reach import reach
from orchestrator.send import Parcel, send
from orchestrator.target import Target, Token

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

ALONE = "cluster.num_workers=0"


@dataclass(frozen=True)
class Far:
    """A cluster that is reached over a link, and the program on a machine that knows it as `far`."""

    client: Dab
    link: Link
    token_file: Path
    storage: Path
    tracking_uri: str

    @property
    def target(self) -> Target:
        return Target("far", self.link.url, Token(self.token_file))

    def folder(self, run_id: str) -> RunFolder:
        return RunFolder(self.storage / run_id)


@pytest.fixture(scope="module")
def far(dab: Dab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    port = int(dab.ok("cluster", "up", "--num-cpus", 4)["dashboard_url"].rpartition(":")[2])
    uri, storage = dab.ok("ui")["tracking_uri"], tmp_path_factory.mktemp("shared")
    with ExitStack() as stack:
        link = Link(port)
        stack.callback(link.close)
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dab-")))
        client = Dab(home, tmp_path_factory.mktemp("elsewhere"))
        token = home / "token"
        token.touch(mode=0o600)
        token.write_text((dab.home / "ray_token").read_text())
        client.ok(
            "cluster", "add", "far", "--address", link.url, "--token-file", token, "--tracking", uri,
            "--storage", storage,
        )  # fmt: skip
        yield Far(client, link, token, storage, uri)


@dataclass(frozen=True)
class Story:
    """What happened to two runs."""

    first: str
    followed: Done
    stopped: dict[str, Any]
    resumed: Done
    second: Done
    sent: tuple[int, int]
    seen: list[dict[str, Any]]


@pytest.fixture(scope="module")
def story(far: Far, digits: Path) -> Story:
    """A long run that is followed while the link is cut, then stopped, resumed and ended; and a short one after it."""
    client, link = far.client, far.link
    before = link.bytes_up
    first = client.ok(*narrow(digits, "first", ALONE, "train.epochs=10000"), "--address", "far", "--detach")["run_id"]
    sent_first = link.bytes_up - before
    following = client.start("logs", first, "--follow")
    wait_until(lambda: len(far.folder(first).metrics()) >= 1 and link.num_connections)
    time.sleep(3)  # lines are on their way
    link.cut()
    time.sleep(3)
    epochs = len(far.folder(first).metrics())
    link.mend()
    wait_until(lambda: len(far.folder(first).metrics()) > epochs + 1)
    stopped = client.ok("stop", first)
    followed = finish(following)
    before = link.bytes_up
    second = client(*narrow(digits, "second", ALONE, "train.epochs=1"), "--address", link.url)
    sent_second = link.bytes_up - before
    seen = [job for job in client.ok("runs", "--address", "far")["runs"] if job["run_id"] == first]
    resumed = client("resume", first, "--detach")
    client.ok("stop", first, "--now")
    return Story(first, followed, stopped, resumed, second, (sent_first, sent_second), seen)


def test_a_run_elsewhere_is_followed_to_its_end_and_recorded_where_the_cluster_says(far: Far, story: Story) -> None:
    assert story.second.code == 0, story.second.stderr
    assert story.second.data["status"] == "finished"
    assert story.second.data["tracking_uri"] == far.tracking_uri
    assert "epoch 1: train loss" in story.second.stderr
    record = tracking.find_run(far.tracking_uri, "second")
    assert record.tags["dab.target"] == "far"
    assert record.tags["dab.folder"] == str(far.storage / record.run_id)


def test_a_log_that_is_followed_survives_a_cut_link_without_a_gap_or_a_line_twice(far: Far, story: Story) -> None:
    assert story.followed.code == 0, story.followed.stderr
    assert "the connection is lost" in story.followed.stderr
    assert "answers again" in story.followed.stderr
    assert story.followed.data["text"] == job_log(far.target, f"dab-{story.first[:16]}-a1")


def test_status_logs_stop_and_resume_find_a_run_elsewhere_without_its_address(far: Far, story: Story) -> None:
    assert story.stopped["status"] == "stopped"
    assert story.stopped["tracking_uri"] == far.tracking_uri
    assert story.resumed.code == 0, story.resumed.stderr
    assert story.resumed.data["job_id"] == f"dab-{story.first[:16]}-a2"
    assert [run["status"] for run in story.seen] == ["stopped"]
    assert not (far.client.home / "cluster.json").exists()
    assert not (far.client.home / "tracking.json").exists()


def test_code_that_the_cluster_has_is_not_sent_again(story: Story) -> None:
    first, second = story.sent
    assert first > package().num_bytes / 10
    assert second < 60_000


def test_no_job_carries_the_token_or_a_text_that_a_user_chose_in_its_entrypoint(far: Far, story: Story) -> None:
    token = far.token_file.read_text().strip()
    shown = [job for job in job_client(far.target).list_jobs() if job.submission_id]
    assert {job.entrypoint for job in shown if story.first[:16] in str(job.submission_id)} == {
        'exec "${DAB_PYTHON:-python}" -m jobs.train'
    }
    assert token not in json.dumps([job.dict() for job in shown], default=str)
    assert not [path for path in far.storage.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_a_cluster_that_is_away_does_not_make_a_run_failed(far: Far, digits: Path) -> None:
    gone = narrow(digits, "alive", ALONE, "train.epochs=10000")
    run_id = far.client.ok(*gone, "--address", "far", "--detach")["run_id"]
    far.link.cut()
    try:
        status = far.client.ok("status", run_id)
        refused = far.client(*gone, "--address", "far", "--detach")
    finally:
        far.link.mend()
    assert status["status"] in ("queued", "running")
    assert status["message"] == "its cluster does not answer; this is what was known last"
    assert refused.code == 1
    assert refused.message.startswith("--address: the cluster far at ")
    far.client.ok("stop", run_id, "--now")
    assert far.client.ok("status", run_id)["status"] == "stopped"


def test_a_run_that_the_cluster_cannot_hold_is_refused_before_anything_is_created(far: Far, digits: Path) -> None:
    before = set(far.storage.iterdir())
    done = far.client(*narrow(digits, "big", "cluster.num_workers=16", "data.batch_size=64"), "--address", "far")
    assert done.code == 2
    assert done.message.startswith(
        "cluster.num_workers: 16 workers of 1 CPU each, but the cluster far (127.0.0.2: 4 CPU"
    )
    assert "12 are missing" in done.message
    assert "--set cluster.wait=true" in done.message
    assert set(far.storage.iterdir()) == before


def test_a_full_cluster_is_waited_for_in_the_order_of_priority(far: Far) -> None:
    target, needs = far.target, Needs(3, 3, {"CPU": 1.0}, "pack", {})
    name = f"held-{time.time_ns()}"
    carried = metadata("holder", 0, needs.total, None)
    job_client(target).submit_job(entrypoint="exec sleep 600", submission_id=name, metadata=carried)
    for job_id, priority in (("low", 0), ("high", 5)):
        job = f"{name}-{job_id}"
        carried = metadata(job_id, priority, needs.total, None)
        send(target, Parcel("platform", job, "{}", "", "test", carried, Waiting(job, needs, may_outgrow=False)))
    rows = wait_until(lambda: len(found := cluster_view.status_of(target)[0]["runs"]) == 3 and found)
    assert {row["name"]: row["state"] for row in rows} == {"holder": "running", "low": "waiting", "high": "waiting"}
    wait_until(lambda: "queued: needs 3 CPU where 0 CPU" in job_log(target, f"{name}-low"))
    stop_job(target, name)
    wait_until(lambda: job_status(target, f"{name}-low") == "SUCCEEDED")
    ended = {job.submission_id: job.end_time for job in job_client(target).list_jobs()}
    assert ended[f"{name}-high"] < ended[f"{name}-low"]
    assert "Linux" in job_log(target, f"{name}-high")


def test_https_needs_a_certificate_that_is_trusted(far: Far, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    link = Link(int(far.link._server_port), context)
    try:
        trusted = Target("far", link.url, Token(far.token_file), verify=str(certificate))
        assert reach(trusted).total["CPU"] == 4
        assert jobs(trusted)
        with pytest.raises(DabError, match=r"^--address: .* shows a certificate that this machine does not trust"):
            reach(replace(trusted, verify=True))
    finally:
        link.close()
