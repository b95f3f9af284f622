"""What one node has and sees before a run trains there, and what is wrong with it.

`look` runs on the node; `judge` is a pure function of what it returned. Who asks which nodes is in `jobs.preflight`.
"""

import hashlib
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from dabnn.data import load_manifest
from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from orchestrator.interfaces import address_of, host_address, interface_of, interfaces
from orchestrator.mlflow_client import is_reachable
from orchestrator.package import ROOMS
from orchestrator.probe import skew, versions
from orchestrator.provenance import PROGRAM_ROOT

MAX_SKEW_S = 5.0
_TRACKER_S = 8.0
LOOK_LIMIT_S = 60.0
MEETING_LIMIT_S = 20.0
# The first node to be looked at is met when the last one was looked at and what they wrote was found.
_LISTENS_S = LOOK_LIMIT_S + MEETING_LIMIT_S + 40.0
_WORKER_BYTES = 400_000_000  # resident size of a worker of a small network, measured
_LOADER_BYTES = 100_000_000  # what a loader does not share with the worker that it was forked from
_DISK_BYTES = 200_000_000
_MEGABYTE = 1e6
_WRONG = "! "
_GROUPS = Path("/sys/fs/cgroup")
# Limit and use of a container's memory, in the newer and the older form of control groups.
_MEMORY_FILES = (
    (_GROUPS / "memory.max", _GROUPS / "memory.current"),
    (_GROUPS / "memory" / "memory.limit_in_bytes", _GROUPS / "memory" / "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Question:
    """What every node is asked.

    Attributes:
        data: Places of the data sets.
        location: The run's folder, a path or URL.
        marker: Name of a file in it that was written where the run is driven from.
        text: What it holds.
        tracking_uri: MLflow server; empty where none is needed.
        interface: Network interface that the run names, or None.
        disks: Folders that need room.
    """

    data: tuple[str, ...]
    location: str
    marker: str
    text: str
    tracking_uri: str
    interface: str | None
    disks: tuple[str, ...]


@dataclass(frozen=True)
class Sight:
    """What a node has and sees; what cannot be had is a text that begins with "! ".

    Attributes:
        versions: Version of each package.
        sources: Digest of the program's sources.
        data: Place of each data set -> digest.
        storage: Empty, or what is wrong with the run's folder.
        tracking: Empty, or what is wrong with the tracking server.
        interface: Name of the network interface; empty where gloo goes by the host name.
        listens: Address and port at which the node can be met until all have met.
        memory_bytes: Free memory.
        shared_bytes: Free shared memory.
        disks: Folder -> free bytes.
    """

    versions: dict[str, str]
    sources: str
    data: dict[str, str]
    storage: str
    tracking: str
    interface: str
    listens: tuple[str, int]
    memory_bytes: int
    shared_bytes: int
    disks: dict[str, int]


@dataclass(frozen=True)
class Share:
    """What an attempt takes on a node.

    Attributes:
        num_workers: Workers on it.
        num_loaders: Loader processes of each.
        batch_bytes: Decoded samples of one step on one worker.
    """

    num_workers: int
    num_loaders: int
    batch_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Memory that is surely needed."""
        return self.num_workers * (_WORKER_BYTES + self.num_loaders * _LOADER_BYTES)

    @property
    def shared_bytes(self) -> int:
        """Shared memory that is needed: torch's loaders hand over two batches each through it."""
        return self.num_workers * 2 * self.num_loaders * self.batch_bytes


@dataclass(frozen=True)
class Here:
    """What the node from which the run is driven has, which all others must have too.

    Attributes:
        versions: Version of each package.
        sources: Digest of the program's sources.
        data: Place of each data set -> digest.
    """

    versions: Mapping[str, str]
    sources: str
    data: Mapping[str, str]

    @classmethod
    def of(cls, data: Sequence[str]) -> "Here":
        """Return what this machine has.

        Raises:
            DabError: A data set cannot be read.
        """
        return cls(versions(), sources_digest(), {place: load_manifest(place).digest for place in dict.fromkeys(data)})


def look(question: Question, address: str) -> Sight:
    """Return what this machine has and sees.

    Args:
        question: What is asked.
        address: IP address under which the cluster knows this machine.
    """
    name = question.interface or interface_of(address) or ""
    found = address_of(name) if name else host_address()
    return Sight(
        versions(),
        sources_digest(),
        {place: _digest(place) for place in question.data},
        _storage(question, address),
        _tracking(question.tracking_uri),
        name if found else f"{_WRONG}{', '.join(interfaces())}",
        _listen(found) if found else ("", 0),
        _free_memory(),
        _free(Path("/dev/shm")),  # noqa: S108 - where POSIX keeps shared memory
        {folder: _free(Path(folder)) for folder in question.disks},
    )


def judge(node: str, sight: Sight, here: Here, question: Question, share: Share) -> list[str]:
    """Return what is wrong with a node, one line each.

    Args:
        node: Its address.
        sight: What it has and sees.
        here: What it must have.
        question: What it was asked.
        share: What the attempt takes on it.
    """
    problems = [
        skew(f"node {node}", sight.versions, here.versions),
        _other_sources(node, sight, here),
        *(_other_data(node, place, sight.data[place], digest) for place, digest in here.data.items()),
        _unusable(node, "storage", question.location, sight.storage),
        _unusable(node, "tracking.uri", question.tracking_uri, sight.tracking),
        _no_interface(node, sight, question),
        _too_little(node, "memory", sight.memory_bytes, share.memory_bytes, "Ask for fewer workers or loaders a node"),
        _too_little(
            node,
            "shared memory in /dev/shm",
            sight.shared_bytes,
            share.shared_bytes,
            "Enlarge it (docker run --shm-size), lower data.num_loaders, or set it to 0",
        ),
        *(_too_little(node, f"room in {disk}", free, _DISK_BYTES, "Free some") for disk, free in sight.disks.items()),
    ]
    return [problem for problem in problems if problem]


def judge_meeting(node: str, ahead_s: float, unreached: Sequence[str]) -> list[str]:
    """Return what is wrong with how a node met the others.

    Args:
        node: Its address.
        ahead_s: Seconds that its clock is ahead of the clock where the run is driven from.
        unreached: Nodes that did not answer it.
    """
    problems = []
    if abs(ahead_s) > MAX_SKEW_S:
        problems.append(
            f"clock: node {node} is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}, at most "
            f"{MAX_SKEW_S:.0f} s are tolerated: logs would contradict each other and a halted worker be noticed late. "
            "Have NTP set it."
        )
    if unreached:
        problems.append(
            f"cluster.interface: node {node} cannot connect to {', '.join(unreached)} over the interface that workers "
            "would use, so they would wait for each other. Open the ports between the nodes, or name another interface."
        )
    return problems


def sources_digest() -> str:
    """Return a digest of the Python sources that this process runs."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (PROGRAM_ROOT / room).rglob("*.py")):
        digest.update(str(path.relative_to(PROGRAM_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def answer(marker: str, address: str) -> str:
    """Return the name of the file that a node writes when it has read a marker."""
    return f"{marker}-{address}"


def _other_sources(node: str, sight: Sight, here: Here) -> str | None:
    if sight.sources == here.sources:
        return None
    return (
        f"versions: node {node} runs other sources of this program than the node that drives the run, so that workers "
        "would not do the same. Install one version on all nodes."
    )


def _other_data(node: str, place: str, found: str, digest: str) -> str | None:
    if found == digest:
        return None
    reason = found.removeprefix(_WRONG) if found.startswith(_WRONG) else f"digest {found[:12]} instead of {digest[:12]}"
    return (
        f"data: node {node} does not see {place} as the node that drives the run does ({reason}). Put it where every "
        "node has it under the same path, or name a URL."
    )


def _unusable(node: str, field: str, place: str, reason: str) -> str | None:
    if not reason:
        return None
    advice = {
        "storage": "Checkpoints must be found by every node: set storage to a folder that all nodes share, or to an "
        "s3:// URL.",
        "tracking.uri": "Name a server that all nodes reach.",
    }[field]
    return f"{field}: node {node} cannot use {place} ({reason}). {advice}"


def _no_interface(node: str, sight: Sight, question: Question) -> str | None:
    if sight.interface.startswith(_WRONG):
        known = sight.interface.removeprefix(_WRONG)
        return (
            f"cluster.interface: node {node} has no interface {question.interface or 'with its own address'} that is "
            f"up and has an address; it has {known}. Name one that every node has."
        )
    return None


def _too_little(node: str, what: str, free: int, needed: int, advice: str) -> str | None:
    if free >= needed:
        return None
    return (
        f"cluster: node {node} has {free / _MEGABYTE:.0f} MB of {what} left, its workers need "
        f"{needed / _MEGABYTE:.0f} MB. {advice}."
    )


def _digest(place: str) -> str:
    try:
        return load_manifest(place).digest
    except (DabError, OSError) as error:
        return f"{_WRONG}{error}"


def _storage(question: Question, address: str) -> str:
    """Read what the driver wrote and leave an answer, which it looks for."""
    try:
        folder = RunFolder.of(question.location)
        if folder.load_json(question.marker).get("text") != question.text:
            return "it is not the storage that the others see"
        folder.leave_json(answer(question.marker, address), {"text": question.text})
    except (DabError, OSError) as error:
        return str(error)
    return ""


def _tracking(uri: str) -> str:
    try:
        return "" if not uri or is_reachable(uri, timeout_s=_TRACKER_S) else "no answer"
    except DabError as error:
        return str(error)


def _listen(address: str) -> tuple[str, int]:
    """Take connections in a thread, until all have surely met; return where."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=128)
    listener.settimeout(_LISTENS_S)

    def serve() -> None:
        with listener, suppress(OSError):  # the time is over
            while True:
                listener.accept()[0].close()

    threading.Thread(target=serve, name="preflight", daemon=True).start()
    return address, int(listener.getsockname()[1])


def _free_memory() -> int:
    """Return what is free of the machine, or of the container that this process is in."""
    free = int(psutil.virtual_memory().available)
    for limit, used in _MEMORY_FILES:
        try:
            allowed, taken = limit.read_text().strip(), int(used.read_text())
            counts = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        given_back = int(counts.get("inactive_file", 0))  # pages of files, which count as used
        return free if allowed == "max" else min(free, int(allowed) - taken + given_back)
    return free


def _free(folder: Path) -> int:
    existing = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    return shutil.disk_usage(existing).free
