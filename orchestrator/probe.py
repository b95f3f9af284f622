"""Before the first run is sent to a cluster elsewhere: what its nodes have and see, asked by a small job, `jobs.probe`.

What a run needs is found missing here, in seconds and with the name of the node, before anything is created: another
Python, Ray or torch than this machine's, packages that are not installed, data that a node does not see, storage that
is not shared, a tracking server that cannot be reached from there. The answer is kept for ten minutes for the same
cluster and the same places. The embedded cluster is this machine and is not asked.
"""

import contextlib
import hashlib
import json
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from dabnn.data import load_manifest
from dabnn.data.remote import shown
from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator.home import home, read_record, write_private
from orchestrator.jobs_api import has_ended, insisting, job_log, stop_job
from orchestrator.target import Target

PREFIX = "DAB_PROBE "
EXACT = ("python", "ray", "torch")
# Imported by every job; another version is accepted, none is not.
NEEDED = ("torchvision", "mlflow", "pydantic", "safetensors", "webdataset", "psutil", "numpy", "pyyaml")
_KEPT_S = 600.0
_LIMIT_S = 180.0
_LOG_LINES = 12


@dataclass(frozen=True)
class Request:
    """What is asked; travels as JSON in an environment variable.

    Attributes:
        data: Places of the data sets.
        storage: Path or URL of the folder in which the runs' folders shall lie.
        marker: Name of a file in it that this machine wrote.
        text: What it holds.
        tracking_uri: MLflow server.
    """

    data: tuple[str, ...]
    storage: str
    marker: str
    text: str
    tracking_uri: str

    def to_json(self) -> str:
        """Return the text that `from_json` reads; Ray replaces `$NAME` in variables, so it holds no dollar."""
        return json.dumps(asdict(self)).replace("$", "\\u0024")

    @classmethod
    def from_json(cls, text: str) -> "Request":
        """Return the request that a text holds."""
        values = json.loads(text)
        return cls(**values | {"data": tuple(values["data"])})


@dataclass(frozen=True)
class NodeReport:
    """What one node has and sees.

    Attributes:
        node: Its address.
        versions: Version of each package, without a build's own mark; "" where it is not installed.
        data: Digest of each data set, or why it cannot be read, beginning with "! ".
        storage: Why the storage cannot be used, or empty.
        tracking: Why the tracking server cannot be reached, or empty.
    """

    node: str
    versions: dict[str, str]
    data: dict[str, str]
    storage: str
    tracking: str


def versions() -> dict[str, str]:
    """Return the versions that are compared, of this machine."""
    return {"python": platform.python_version(), **{name: _version(name) for name in (*EXACT[1:], *NEEDED, "dab")}}


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]  # 2.13.0+cu130 and 2.13.0+cpu are one torch
    except PackageNotFoundError:
        return ""


def skew(where: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """Return how the versions of a node differ from this machine's so that a run could fail or differ; None if not."""
    different = [name for name in EXACT if _comparable(name, theirs.get(name, "")) != _comparable(name, ours[name])]
    if theirs.get("dab") and theirs["dab"] != ours.get("dab"):
        different.append("dab")
    if different:
        pairs = ", ".join(f"{name} {theirs.get(name) or 'not installed'} (here {ours[name]})" for name in different)
        return (
            f"versions: {where} has {pairs}. A run would fail there, or not be the one that was tested here. Install "
            "the same versions on both; requirements.lock names them."
        )
    missing = [name for name in NEEDED if not theirs.get(name)]
    if missing:
        return (
            f"versions: {where} lacks {', '.join(missing)}. Install what requirements.lock pins on every node, and "
            "start Ray from that environment."
        )
    return None


def _comparable(name: str, text: str) -> str:
    """Return what must be equal: of Python the minor version, as of 3.11.2 and 3.11.9."""
    return ".".join(text.split(".")[:2]) if name == "python" else text


def problem(
    reports: Sequence[NodeReport], ours: Mapping[str, str], digests: Mapping[str, str], storage: str
) -> str | None:
    """Return the first thing that is wrong with what the nodes reported, with the node's name; None if nothing is.

    Args:
        reports: One of each node.
        ours: Versions of this machine.
        digests: Digest of each data set as this machine reads it.
        storage: Where the runs' folders shall lie.
    """
    for report in reports:
        different = skew(f"node {report.node}", report.versions, ours)
        if different:
            return different
        for place, digest in digests.items():
            found = report.data.get(place, "! it was not looked at")
            if found != digest:
                reason = found.removeprefix("! ") if found.startswith("! ") else "it holds other data than here"
                return (
                    f"data: {place} is not seen by node {report.node} ({reason}). Put it where every node has it "
                    "under the same path, or name a URL."
                )
        if report.storage:
            return (
                f"storage: {storage} of this machine is not that of node {report.node} ({report.storage}). "
                "Checkpoints must be found by every node: name a shared folder or a URL, with --set storage=... or "
                "in clusters.toml."
            )
        if report.tracking:
            return (
                f"tracking.uri: node {report.node} cannot reach it ({report.tracking}). Name a server that all nodes "
                "reach."
            )
    return None


def check_nodes(
    target: Target,
    session: str,
    *,
    places: Sequence[str],
    storage: str,
    tracking_uri: str,
    start: Callable[[str, str], None],
    on_wait: Callable[[str], None] | None = None,
) -> None:
    """Refuse a cluster whose nodes could not run what is about to be sent.

    Args:
        target: The cluster.
        session: Which start of the cluster this is.
        places: Data sets.
        storage: Where the runs' folders shall lie.
        tracking_uri: MLflow server.
        start: Starts the job: takes its name and the request.
        on_wait: Told what is being waited for.

    Raises:
        InvalidInputError: Something is missing; says what, and on which node.
        DabError: The job could not tell.
    """
    digests = {place: load_manifest(place).digest for place in dict.fromkeys(places)}
    key = json.dumps([target.jobs_url, session, digests, storage, tracking_uri, versions()])
    kept = home() / "probes" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if time.time() - (read_record(kept) or {}).get("time", 0.0) < _KEPT_S:
        return
    with _marker(storage) as (marker, text):
        request = Request(tuple(digests), storage, marker, text, tracking_uri)
        log = _run(target, request, start, on_wait or (lambda _: None))
    found = _reports(log)
    wrong = problem(found, versions(), digests, storage)
    if wrong:
        raise InvalidInputError(wrong)
    if not found or "probe is complete" not in log:
        tail = "\n".join(log.splitlines()[-_LOG_LINES:])
        advice = (
            "Start Ray from the program's environment, so that `python` on its PATH is that one, or set python in "
            "clusters.toml."
        )
        raise DabError(f"{target}: a job that looks at its nodes failed. {advice} Its log ends:\n{tail}")
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    write_private(kept, json.dumps({"time": time.time()}))


@contextlib.contextmanager
def _marker(storage: str) -> Iterator[tuple[str, str]]:
    """Give the name of a file in the storage and a text in it, which nobody else knows; removed afterwards."""
    folder, name, text = RunFolder.of(storage), f".dab-probe-{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        folder.leave_json(name, {"text": text})
        if folder.copy is None:
            (folder.root / name).chmod(0o644)  # a node's Ray may run as another user
    except (DabError, OSError) as error:
        raise InvalidInputError(
            f"storage: {shown(storage)} cannot be written to from here ({error}). A run's folder is made by this "
            "machine and used by the nodes: name a folder that all of them share, or a URL."
        ) from error
    try:
        yield name, text
    finally:
        folder.remove(name)


def _run(target: Target, request: Request, start: Callable[[str, str], None], on_wait: Callable[[str], None]) -> str:
    job_id = f"dab-probe-{secrets.token_hex(8)}"
    start(job_id, request.to_json())
    deadline = time.monotonic() + _LIMIT_S
    while not insisting(lambda: has_ended(target, job_id)):
        on_wait(f"{target}: asking its nodes for versions, data and storage")
        if time.monotonic() > deadline:
            with contextlib.suppress(DabError):  # it may not end either
                stop_job(target, job_id)
            raise DabError(
                f"{target}: its nodes did not answer within {_LIMIT_S:.0f} s; the cluster may be overloaded, or a "
                "node gone."
            )
        time.sleep(0.3)
    return insisting(lambda: job_log(target, job_id))


def _reports(log: str) -> list[NodeReport]:
    lines = re.findall(rf"^{PREFIX}(.*)$", log, flags=re.MULTILINE)
    return [NodeReport(**json.loads(line)) for line in lines]
