"""Whose turn it is on a cluster that several people share: order, room and quota, from what the jobs carry with them.

A job that finds no room when it is submitted starts as `jobs.queued`, a small process that waits here and then becomes
the job's own program. All rules are advisory: the users of a cluster share one token, and each job says itself who sent
it, how urgent it is and what it needs. The order is priority, then time of submission; nobody overtakes, so that a big
run is not starved by small ones, except past runs that wait for their own user's quota.
"""

import getpass
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dabnn.errors import DabError
from orchestrator.capacity import Needs, Node, Placement, num_places, shortage
from orchestrator.clusters_file import EMBEDDED
from orchestrator.jobs_api import LIVING_JOBS, SeenJob, jobs
from orchestrator.reach import Reached, reach
from orchestrator.target import Target, default_token

USER = "dab_user"
PRIORITY = "dab_priority"
NEEDS = "dab_needs"
MAX_RUNNING = "dab_max_running"
NAME = "dab_name"
QUEUED = "dab_queued"  # there when it had to wait
VARIABLE = "DAB_QUEUE"


@dataclass(frozen=True)
class Entry:
    """A run on a cluster, as its job describes it.

    Attributes:
        job_id: Name of the job.
        user: Who sent it.
        priority: Higher ones start first.
        submitted_at: Seconds since 1970.
        needs: What its workers need.
        max_running: Runs of this user at a time, None for no limit.
        is_running: Whether it had its turn.
        name: Name of the run.
    """

    job_id: str
    user: str
    priority: int
    submitted_at: float
    needs: Needs
    max_running: int | None
    is_running: bool
    name: str = ""


@dataclass(frozen=True)
class Turn:
    """Whether a run may start.

    Attributes:
        action: Start it, or wait.
        reason: Why it waits, for its log and `dab cluster status`.
    """

    action: Literal["start", "wait"]
    reason: str = ""


@dataclass(frozen=True)
class Waiting:
    """What a job must know to wait for its turn; travels as JSON in an environment variable.

    Attributes:
        job_id: Name of the job.
        needs: What its run asks for.
        may_outgrow: Whether it waits while the cluster is too small for it, too.
    """

    job_id: str
    needs: Needs
    may_outgrow: bool

    def to_json(self) -> str:
        """Return the text that `from_json` reads; Ray replaces `$NAME` in variables, so it holds no dollar."""
        return json.dumps(asdict(self)).replace("$", "\\u0024")

    @classmethod
    def from_json(cls, text: str) -> "Waiting":
        """Return what a text holds."""
        values = json.loads(text)
        return cls(**values | {"needs": Needs(**values["needs"])})


def turn_now(waiting: Waiting) -> Turn:
    """Return whether it is the turn of a job that asks from within its cluster.

    Raises:
        DabError: The Jobs API does not answer.
    """
    target = own_cluster()
    reached = reach(target)
    short = shortage(waiting.needs, reached.nodes, "the cluster") if waiting.may_outgrow else None
    if short:
        return Turn("wait", short)
    found = entries(jobs(target))
    mine = next((entry for entry in found if entry.job_id == waiting.job_id), None)
    if mine is None:  # it cannot be told from others; whoever asks runs, so nobody waits for it
        return Turn("start")
    return turn_of(mine, [entry for entry in found if entry is not mine], reached.nodes)


def turn_at_submission(target: Target, reached: Reached, carried: Mapping[str, str]) -> Turn:
    """Return whether a run that is about to be submitted would find its turn at once: everybody else came before.

    Args:
        target: The cluster.
        reached: What it says of itself.
        carried: The metadata of its job.
    """
    mine = _entry(SeenJob("", LIVING_JOBS[0], math.inf, {**carried, QUEUED: ""}, has_begun=False))
    return Turn("start") if mine is None else turn_of(mine, entries(jobs(target)), reached.nodes)


def reason_of(target: Target, job_id: str) -> str:
    """Return why a job of a cluster waits for its turn, or an empty text.

    Raises:
        DabError: The cluster does not answer.
    """
    if not target.jobs_url:
        return ""
    turn = turns(entries(jobs(target)), reach(target).nodes).get(job_id)
    return f"waits for its turn: {turn.reason}" if turn is not None and turn.reason else ""


def own_cluster() -> Target:
    """Return the cluster that this process is a job of, as it is reached from there."""
    from ray.dashboard.utils import get_address_for_submission_client

    try:
        return Target(EMBEDDED, get_address_for_submission_client(None), default_token())
    except (ConnectionError, RuntimeError) as error:
        raise DabError(f"the Ray cluster: its Jobs API cannot be found from its node ({error}).") from error


def user_name() -> str:
    """Return who sends runs from here: DAB_USER of the environment, else the name of the system's user."""
    try:
        return os.environ.get("DAB_USER") or getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def metadata(name: str, priority: int, needs: Needs, max_running: int | None) -> dict[str, str]:
    """Return what a job carries, so that others can tell whose turn it is."""
    values = {NAME: name, USER: user_name(), PRIORITY: str(priority), NEEDS: json.dumps(asdict(needs))}
    return values | ({MAX_RUNNING: str(max_running)} if max_running else {})


def entries(jobs: Sequence[SeenJob]) -> list[Entry]:
    """Return the runs among the jobs of a cluster that have not ended; what was not sent by `dab` is left out."""
    found = (_entry(job) for job in jobs if job.status in LIVING_JOBS)
    return [entry for entry in found if entry is not None]


def turn_of(mine: Entry, others: Sequence[Entry], nodes: Sequence[Node]) -> Turn:
    """Return whether it is the turn of `mine`: a run starts with its fewest workers and then takes what it can use.

    Args:
        mine: The run that asks.
        others: The other runs of the cluster that have not ended.
        nodes: All nodes that are alive.
    """
    total = _sum(node.resources for node in nodes)
    running = [entry for entry in others if entry.is_running]
    ahead = [entry for entry in others if not entry.is_running and _before(entry, mine)]
    ahead = [entry for entry in ahead if not _is_held(entry, running) and _could_start(entry.needs, nodes, total)]
    own = sum(entry.user == mine.user for entry in (*running, *ahead))
    if mine.max_running is not None and own >= mine.max_running:
        return Turn("wait", f"{mine.user} has {own} runs on the cluster, and {mine.max_running} may run at a time")
    taken = _sum([*(_held(each.needs, nodes) for each in running), *(_least(each.needs) for each in ahead)])
    short = _short(_least(mine.needs), total, taken)
    if not short or not (running or ahead):
        return Turn("start")
    wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in short.items())
    free = ", ".join(f"{max(0.0, total.get(kind, 0) - taken.get(kind, 0)):g} {kind}" for kind in short)
    queue = f", {len(ahead)} ahead of it" if ahead else ""
    return Turn("wait", f"needs {wanted} where {free} is left by {len(running)} runs{queue}")


def turns(found: Sequence[Entry], nodes: Sequence[Node]) -> dict[str, Turn]:
    """Return for each run that waits whether it is its turn, and why not."""
    return {
        entry.job_id: turn_of(entry, [other for other in found if other is not entry], nodes)
        for entry in found
        if not entry.is_running
    }


def _before(one: Entry, other: Entry) -> bool:
    return (-one.priority, one.submitted_at, one.job_id) < (-other.priority, other.submitted_at, other.job_id)


def _is_held(entry: Entry, running: Sequence[Entry]) -> bool:
    """Whether a run waits for the quota of its user, which is no reason for others to wait."""
    return entry.max_running is not None and sum(each.user == entry.user for each in running) >= entry.max_running


def _could_start(needs: Needs, nodes: Sequence[Node], total: Mapping[str, float]) -> bool:
    """Whether a run could start if nothing else ran, placement and labels heeded."""
    return shortage(needs, nodes, "") is None and not _short(_least(needs), total, {})


def _least(needs: Needs) -> dict[str, float]:
    return needs.times(needs.least)


def _held(needs: Needs, nodes: Sequence[Node]) -> dict[str, float]:
    """Return what a run that goes on takes, or will take when it grows: all its workers that have a place."""
    return needs.times(min(needs.num_workers, num_places(needs, nodes)))


def _short(needs: Mapping[str, float], total: Mapping[str, float], taken: Mapping[str, float]) -> dict[str, float]:
    """Return what of `needs` finds no room beside what is taken."""
    return {kind: amount for kind, amount in needs.items() if total.get(kind, 0) - taken.get(kind, 0) < amount}


def _sum(amounts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for needs in amounts:
        for kind, amount in needs.items():
            total[kind] = total.get(kind, 0) + amount
    return total


def _needs(values: Mapping[str, Any]) -> Needs:
    """Return what a job carries; anyone with the token may have written it."""
    each = {str(kind): float(amount) for kind, amount in values["each"].items()}
    labels = {str(key): str(value) for key, value in values["labels"].items()}
    if not each or min(each.values()) <= 0 or values["placement"] not in get_args(Placement):
        raise ValueError(f"{values}")
    return Needs(int(values["num_workers"]), int(values["least"]), each, values["placement"], labels)


def _entry(job: SeenJob) -> Entry | None:
    try:
        needs = _needs(json.loads(job.metadata[NEEDS]))
        limit = job.metadata.get(MAX_RUNNING)
        return Entry(
            job.job_id,
            job.metadata.get(USER, ""),
            int(job.metadata.get(PRIORITY, "0")),
            job.submitted_at,
            needs,
            int(limit) if limit else None,
            job.has_begun or QUEUED not in job.metadata,
            job.metadata.get(NAME, ""),
        )
    except (KeyError, ValueError, AttributeError, TypeError):
        return None
