"""Looks at the nodes of an attempt before its workers start: in seconds, what would else be a hang or a late failure.

Every node that will hold a worker is asked what it has and sees (`orchestrator.sight`); then all connect to each other
over the interfaces that their workers will use, and tell the time. The node of this program is looked at in this
process; another costs the start of one process there. What is found begins with the field and names the node.
"""

import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from dabnn.run_store import patiently
from orchestrator.mlflow_client import is_reachable
from orchestrator.sight import (
    LOOK_LIMIT_S,
    MEETING_LIMIT_S,
    Here,
    Question,
    Share,
    Sight,
    answer,
    judge,
    judge_meeting,
    look,
)

Value = TypeVar("Value")

_CONNECT_S = 5.0
_NETWORK_S = 2.0  # how long a network folder may take to show what another machine wrote
_TRACKER_S = 3.0
_TELL_EVERY_S = 30.0
_PEERS = 8  # each node connects to so many of the others


@dataclass(frozen=True)
class Wanted:
    """What an attempt needs of its nodes.

    Attributes:
        data: Places of the data sets.
        tracking_uri: MLflow server; empty where none is needed.
        interface: Network interface that the run names, or None.
        num_loaders: Loader processes of a worker.
        sample_bytes: One decoded sample.
        batch_size: Samples of a step over all workers.
        disks: Folders of the nodes that need room.
    """

    data: tuple[str, ...]
    tracking_uri: str
    interface: str | None
    num_loaders: int
    sample_bytes: int
    batch_size: int
    disks: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """What was found; empty where all is well.

    Attributes:
        problems: Node id -> lines that say what is wrong with it.
        lost: Node id -> line of a node that does not answer.
    """

    problems: dict[str, list[str]]
    lost: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.problems or self.lost)

    def __str__(self) -> str:
        return "\n".join([*(line for lines in self.problems.values() for line in lines), *self.lost.values()])


def wait_for_store(folder: RunFolder, retry_s: float, tell: Callable[[str], None]) -> bool:
    """Wait until the store of a run takes a file and gives it back; return whether that took any waiting.

    Args:
        folder: The run's folder; one that lies behind no URL is not waited for.
        retry_s: How long to wait at most.
        tell: Told now and then what is waited for.

    Raises:
        StoreError: The store refuses, or does not answer for so long.
    """
    if folder.copy is None:
        return False
    store, name, told_at = folder.copy.store, f".preflight-{secrets.token_hex(8)}", list[float]()

    def wait(text: str) -> None:
        if not told_at or time.monotonic() - told_at[-1] >= _TELL_EVERY_S:
            told_at.append(time.monotonic())
            tell(text)

    for call in (lambda: store.write(name, b"dab"), lambda: store.read(name), lambda: store.remove(name)):
        patiently(call, str(store), retry_s, on_wait=wait)
    return bool(told_at)


def look_at(places: Sequence[str], addresses: Mapping[str, str], folder: RunFolder, wanted: Wanted) -> Findings:
    """Look at the nodes of an attempt.

    Args:
        places: Ids of the nodes of the workers, one entry a worker.
        addresses: Node id -> address.
        folder: The run's folder.
        wanted: What the attempt needs of them.

    Raises:
        DabError: Data or storage cannot be used from this node.
    """
    workers, here = Counter(places), Here.of(wanted.data)
    batch_bytes = wanted.sample_bytes * -(-wanted.batch_size // len(places))
    with _marked(folder) as (marker, text):
        question = Question(
            tuple(here.data), folder.location, marker, text, _tracker(wanted), wanted.interface, wanted.disks
        )
        sights, lost = _ask(
            {node: partial(look, question, addresses[node]) for node in workers}, addresses, LOOK_LIMIT_S
        )
        seeing = {node: addresses[node] for node, sight in sights.items() if not sight.storage}
        problems = _unseen(folder, marker, text, seeing)
    for node, sight in sights.items():
        share = Share(workers[node], wanted.num_loaders, batch_bytes)
        problems[node] = judge(addresses[node], sight, here, question, share) + problems.get(node, [])
    if len(sights) > 1 and not lost and not any(problems.values()):
        met, late = _meet(sights, addresses)
        problems = {node: judge_meeting(addresses[node], *result) for node, result in met.items()}
        lost |= late
    return Findings({node: problems[node] for node in workers if problems.get(node)}, lost)


def _ask(
    calls: Mapping[str, Callable[[], Value]], addresses: Mapping[str, str], limit_s: float
) -> tuple[dict[str, Value], dict[str, str]]:
    """Make one call on each node; return what they returned, and a line for each node that was lost meanwhile."""
    own = ray.get_runtime_context().get_node_id()
    pending = {_start(node, call): node for node, call in calls.items() if node != own}
    found = {own: calls[own]()} if own in calls else {}
    done, late = ray.wait(list(pending), num_returns=len(pending), timeout=limit_s) if pending else ([], [])
    lost = {pending[each]: f"cluster: node {addresses[pending[each]]} did not answer within {limit_s:.0f} s. It is "
            "overloaded or cut off; look at it, or stop Ray there." for each in late}  # fmt: skip
    for each in done:
        node = pending[each]
        try:
            found[node] = ray.get(each)
        except ray.exceptions.RayTaskError:  # a bug of ours keeps its traceback
            raise
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            lost[node] = f"cluster: node {addresses[node]} was lost while it was looked at ({reason})."
    for each in late:
        ray.cancel(each, force=True)
    return found, lost


def _start(node: str, call: Callable[[], Value]) -> "ray.ObjectRef[Value]":
    task: Any = ray.remote(_call)
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    started: ray.ObjectRef[Value] = task.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(call)
    return started


def _call(call: Callable[[], Value]) -> Value:
    return call()


def _meet(
    sights: Mapping[str, Sight], addresses: Mapping[str, str]
) -> tuple[dict[str, tuple[float, list[str]]], dict[str, str]]:
    """Have nodes connect to each other; return seconds that each one's clock is ahead and who did not answer it."""
    doors = [(addresses[node], sight.listens) for node, sight in sights.items()]
    calls = {
        node: partial(knock, [doors[(place + step) % len(doors)] for step in range(1, min(len(doors), _PEERS + 1))])
        for place, node in enumerate(sights)
    }
    asked_at = time.time()
    found, lost = _ask(calls, addresses, MEETING_LIMIT_S)
    answered_at = time.time()
    # A clock that is right shows a time between question and answer.
    return {
        node: (told_at - min(max(told_at, asked_at), answered_at), unreached)
        for node, (told_at, unreached) in found.items()
    }, lost


def knock(doors: Sequence[tuple[str, tuple[str, int]]]) -> tuple[float, list[str]]:
    """Connect to nodes; return the time here, and the names of those that do not answer.

    Args:
        doors: Name of a node, and where it listens.
    """
    unreached = []
    for name, door in doors:
        try:
            socket.create_connection(door, timeout=_CONNECT_S).close()
        except OSError:
            unreached.append(name)
    return time.time(), unreached


def _tracker(wanted: Wanted) -> str:
    """Return the server that the nodes must reach: none if it is away from here too, which a run survives."""
    uri = wanted.tracking_uri
    return uri if uri and is_reachable(uri, timeout_s=_TRACKER_S) else ""


@contextmanager
def _marked(folder: RunFolder) -> Iterator[tuple[str, str]]:
    """Give the name of a file in the run's folder and the text in it, which nobody else knows; removed afterwards."""
    marker, text = f".preflight-{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        folder.leave_json(marker, {"text": text})
    except OSError as error:
        raise DabError(f"storage: {folder.location} cannot be written to ({error}).") from error
    try:
        yield marker, text
    finally:
        folder.remove(marker)


def _unseen(folder: RunFolder, marker: str, text: str, answered: Mapping[str, str]) -> dict[str, list[str]]:
    """Return what is wrong with nodes whose answer does not appear in the run's folder; answers are removed.

    Args:
        folder: The run's folder.
        marker: Name of the file that they read.
        text: What stood in it.
        answered: Node id -> address, of those that say that they have written.
    """
    deadline = time.monotonic() + _NETWORK_S
    problems = {}
    for node, address in answered.items():
        name = answer(marker, address)
        while folder.load_json(name).get("text") != text and time.monotonic() < deadline:
            time.sleep(0.1)
        if folder.load_json(name).get("text") != text:
            line = (
                f"storage: what node {address} writes in {folder.location} is not seen by the node that drives the "
                "run. Set storage to a folder that all nodes share, or to an s3:// URL."
            )
            problems[node] = [line]
        folder.remove(name)
    return problems
