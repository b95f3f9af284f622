"""Runs that are sent to a cluster elsewhere: another home than the cluster's, over a link that can be cut."""

import re
import shutil
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from link import Link
from program import Dab, wait_until
from test_jobs import CONFIG, narrow

from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator import cluster_view, commands, tracking
from orchestrator.capacity import Needs
from orchestrator.clusters_file import Entry
from orchestrator.jobs_api import job_client, job_log, job_status, jobs, stop_job
from orchestrator.package import package, snapshot, sources
from orchestrator.provenance import PROGRAM_ROOT
from orchestrator.queue import Waiting, metadata
from orchestrator.reach import reach
from orchestrator.send import Parcel, send
from orchestrator.target import Target, Token

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

ALONE = "cluster.num_workers=0"


@dataclass(frozen=True)
class Far:
    """A cluster that is reached over a link, from a home where it is known as `far`; notes are what a person reads."""

    link: Link
    home: Path
    token_file: Path
    storage: Path
    tracking_uri: str
    notes: list[str] = field(default_factory=list)

    @property
    def target(self) -> Target:
        return Target("far", self.link.url, Token(self.token_file))

    def folder(self, run_id: str) -> RunFolder:
        return RunFolder(self.storage / run_id)

    def submit(self, arguments: list[str], address: str = "far", *, detach: bool = False) -> dict[str, Any]:
        """Submit, as `dab submit` does, with the arguments of `narrow`."""
        return commands.submit_run(
            CONFIG, arguments[3::2], sweep=False, detach=detach, say=self.notes.append, address=address
        )[0]

    def status(self, run_id: str) -> dict[str, Any]:
        return commands.show_status(None, run_id, self.notes.append)[0]

    def stop(self, run_id: str, *, now: bool = False) -> dict[str, Any]:
        return commands.stop_run(None, run_id, now=now, grace_s=120, say=self.notes.append)[0]


@pytest.fixture(scope="module")
def far(dab: Dab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    port = int(dab.ok("cluster", "up", "--num-cpus", 4)["dashboard_url"].rpartition(":")[2])
    uri, storage = dab.ok("ui")["tracking_uri"], tmp_path_factory.mktemp("shared")
    with ExitStack() as stack:
        link = Link(port)
        stack.callback(link.close)
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dab-")))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("DAB_HOME", str(home))
        changed = changed_program(tmp_path_factory.mktemp("code"))
        patch.setattr("orchestrator.send.snapshot", partial(snapshot, changed))
        patch.setattr("orchestrator.origin.package", partial(package, changed))
        token = home / "token"
        token.touch(mode=0o600)
        token.write_text((dab.home / "ray_token").read_text())
        entry = Entry(link.url, str(token), tracking=uri, storage=str(storage))
        cluster_view.add("far", entry, replace=False, is_checked=True)
        yield Far(link, home, token, storage, uri)


def changed_program(folder: Path) -> Path:
    """Copy the program and change it: no run before has sent this code to the cluster."""
    for source in sources():
        copy = folder / source.relative_to(PROGRAM_ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    (folder / "jobs" / "new.py").write_text(f'"""Made at {time.time_ns()}."""\n')
    return folder


@dataclass(frozen=True)
class Story:
    """What happened to two runs: text and notes of whoever followed, what commands returned, bytes that were sent."""

    first: str
    text: str
    notes: list[str]
    away: dict[str, Any]
    refused: str
    stopped: dict[str, Any]
    resumed: dict[str, Any]
    second: dict[str, Any]
    sent: tuple[int, int]


@pytest.fixture(scope="module")
def story(far: Far, digits: Path) -> Story:
    """A long run that is followed while the link is cut, stopped, resumed and ended at once; a short one in between."""
    link, before = far.link, far.link.bytes_up
    first = far.submit(narrow(digits, "first", ALONE, "train.epochs=10000"), detach=True)["run_id"]
    sent_first = link.bytes_up - before
    text: list[str] = []
    notes: list[str] = []
    follower = threading.Thread(
        target=lambda: text.extend(commands.logs(None, first, follow=True, say=notes.append)), daemon=True
    )
    follower.start()
    wait_until(lambda: far.folder(first).metrics() and any("epoch 1:" in part for part in text))
    link.cut()
    wait_until(lambda: any("the connection is lost" in note for note in notes))
    away = far.status(first)
    with pytest.raises(DabError) as refused:
        far.submit(narrow(digits, "refused", ALONE))
    epochs = len(far.folder(first).metrics())
    wait_until(lambda: len(far.folder(first).metrics()) > epochs)
    link.mend()
    wait_until(lambda: any("answers again" in note for note in notes))
    stopped = far.stop(first)
    follower.join(120)
    before = link.bytes_up
    second = far.submit(narrow(digits, "second", ALONE, "train.epochs=1"), link.url)
    sent_second = link.bytes_up - before
    resumed = commands.resume_run(None, first, detach=True, say=far.notes.append)[0]
    far.stop(first, now=True)
    return Story(
        first, "".join(text), notes, away, str(refused.value), stopped, resumed, second, (sent_first, sent_second)
    )


def test_a_run_elsewhere_is_followed_to_its_end_and_recorded_where_the_cluster_says(far: Far, story: Story) -> None:
    assert story.second["status"] == "finished"
    assert story.second["tracking_uri"] == far.tracking_uri
    assert any("epoch 1: train loss" in note for note in far.notes)
    record = tracking.find_run(far.tracking_uri, "second")
    assert record.tags["dab.target"] == "far"
    assert record.tags["dab.folder"] == str(far.storage / record.run_id)


def test_a_log_that_is_followed_survives_a_cut_link_without_a_gap_or_a_line_twice(far: Far, story: Story) -> None:
    assert story.text == job_log(far.target, f"dab-{story.first[:16]}-a1")


def test_a_cluster_that_is_away_is_said_to_be_and_no_run_is_failed_for_it(story: Story) -> None:
    assert story.away["status"] == "running"
    assert story.away["message"] == "its cluster does not answer; this is what was known last"
    assert story.refused.startswith("--address: the cluster far at ")


def test_status_logs_stop_and_resume_find_a_run_elsewhere_without_its_address(far: Far, story: Story) -> None:
    assert story.stopped["status"] == "stopped"
    assert story.stopped["tracking_uri"] == far.tracking_uri
    assert story.resumed["job_id"] == f"dab-{story.first[:16]}-a2"
    assert far.status("first")["status"] == "stopped"
    assert not (far.home / "cluster.json").exists()
    assert not (far.home / "tracking.json").exists()


def test_code_that_the_cluster_has_is_not_sent_again(story: Story) -> None:
    first, second = story.sent
    assert first > package().num_bytes / 10
    assert second < 60_000


def test_no_job_carries_the_token_or_a_text_that_a_user_chose_in_its_entrypoint(far: Far, story: Story) -> None:
    token = far.token_file.read_text().strip()
    shown = [job for job in job_client(far.target).list_jobs() if job.submission_id]
    entrypoints = {job.entrypoint for job in shown if story.first[:16] in str(job.submission_id)}
    assert [
        bool(re.fullmatch(r'exec "\$\{DAB_PYTHON:-python\}" -m jobs\.queued jobs\.\w+', each)) for each in entrypoints
    ] == [True]
    assert token not in repr(shown)
    assert not [path for path in far.storage.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_a_run_that_the_cluster_cannot_hold_is_refused_before_anything_is_created(far: Far, digits: Path) -> None:
    before = set(far.storage.iterdir())
    with pytest.raises(
        InvalidInputError, match=r"^cluster.num_workers: 16 workers of 1 CPU each, but the cluster far "
    ):
        far.submit(narrow(digits, "big", "cluster.num_workers=16", "data.batch_size=64"))
    assert set(far.storage.iterdir()) == before


def test_a_full_cluster_is_waited_for_in_the_order_of_priority(far: Far) -> None:
    target, needs = far.target, Needs(3, 3, {"CPU": 1.0}, "pack", {})
    name = f"held-{time.time_ns()}"
    carried = metadata("holder", 0, needs, None)
    job_client(target).submit_job(entrypoint="exec sleep 600", submission_id=name, metadata=carried)
    for job_id, priority in (("low", 0), ("high", 5)):
        job = f"{name}-{job_id}"
        carried = metadata(job_id, priority, needs, None)
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
