"""What `dab cluster add`, `list` and `status --address` show of clusters elsewhere."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator import queue
from orchestrator.clusters_file import Entry, add_cluster, known_clusters
from orchestrator.jobs_api import jobs
from orchestrator.output import Report, Table, View, duration_text
from orchestrator.queue import Turn
from orchestrator.reach import Reached, reach
from orchestrator.target import Target, jobs_url, named


def add(name: str, entry: Entry, *, replace: bool, is_checked: bool) -> View:
    """Write a cluster into `clusters.toml`, unless `is_checked` and it cannot be reached.

    Raises:
        InvalidInputError: The name is taken or none, the address is none, or the cluster refuses us.
        DabError: It does not answer; nothing was written.
    """
    paths = {"token_file": _absolute(entry.token_file), "verify": _absolute(entry.verify)}
    wanted = Entry(**asdict(entry) | paths | {"address": jobs_url(f"--address of {name}", entry.address)})
    found = reach(named(name, wanted)) if is_checked else None
    file = add_cluster(name, wanted, replace=replace)
    what = "not asked" if found is None else _size_text(found)
    return {"name": name, "file": str(file), **asdict(wanted)}, f"{name}: {wanted.address}, {what}; written to {file}"


def list_clusters() -> View:
    """Return the clusters of `clusters.toml`; none of them is asked."""
    known = {name: asdict(entry) for name, entry in known_clusters().items()}
    rows = [{"name": name, **entry} for name, entry in known.items()]
    table = Table.of(rows, ["name", "address", "tracking", "storage"])
    return {"clusters": known}, str(table) if rows else "none; `dab cluster add NAME --address URL` adds one"


def status_of(target: Target) -> View:
    """Return what a cluster has, and the runs on it that have not ended: who, how urgent, and why they wait.

    Raises:
        DabError: It does not answer.
    """
    found = reach(target)
    entries = queue.entries(jobs(target))
    turns = queue.turns(entries, found.nodes)
    data = {
        "cluster": {
            "name": target.name,
            "state": "running",
            "jobs_url": target.jobs_url,
            "ray_version": found.ray_version,
            "nodes": [asdict(node) for node in found.nodes],
        },
        "runs": [_row(entry, turns.get(entry.job_id)) for entry in entries],
    }
    return data, Report(
        [f"{target.name}: {target.jobs_url}, Ray {found.ray_version}, {_size_text(found)}", _table(data)]
    )


def _row(entry: queue.Entry, turn: Turn | None) -> dict[str, Any]:
    state = "running" if turn is None else "waiting" if turn.action == "wait" else "starting"
    reason = "" if turn is None else turn.reason
    return asdict(entry) | {"needs": entry.needs.total, "state": state, "reason": reason}


def _table(data: dict[str, Any]) -> str | Table:
    rows: Sequence[dict[str, Any]] = [
        {
            "run": row["name"],
            "user": row["user"],
            "priority": row["priority"],
            "state": row["state"] + (f": {row['reason']}" if row["reason"] else ""),
            "needs": ", ".join(f"{amount:g} {kind}" for kind, amount in row["needs"].items()),
            "since": duration_text(max(0.0, time.time() - row["submitted_at"])),
        }
        for row in data["runs"]
    ]
    return Table.of(rows, ["run", "user", "priority", "needs", "since", "state"]) if rows else "no runs"


def _size_text(found: Reached) -> str:
    total = found.total
    return f"{len(found.nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"


def _absolute(file: Any) -> Any:
    return str(Path(file).expanduser().absolute()) if isinstance(file, str) else file
