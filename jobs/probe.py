"""What the nodes of a cluster have and see, printed as one line of JSON a node: `python -m jobs.probe`.

Runs before the first run is sent to a cluster elsewhere; see `orchestrator.probe`. The node of this job reports before
Ray is asked for the others, since Ray itself refuses another Python or Ray.
"""

import json
import os
import secrets
import socket
import sys
from dataclasses import asdict

import ray

from dabnn.data import load_manifest
from dabnn.errors import DabError
from dabnn.run_folder import RunFolder
from jobs.connect import connect
from jobs.train import say
from orchestrator.job import VARIABLE
from orchestrator.mlflow_client import is_reachable
from orchestrator.probe import PREFIX, NodeReport, Request, versions

_NODE_LIMIT_S = 90.0


def main() -> int:
    """Report this node, then all others; return 0 when every node has answered."""
    request = Request.from_json(os.environ[VARIABLE])
    say(PREFIX + json.dumps(asdict(look(request, socket.gethostname()))))
    connect()
    own = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != own]
    pending = {_look_on(node, request): node["NodeManagerAddress"] for node in others}
    done, late = ray.wait(list(pending), num_returns=len(pending), timeout=_NODE_LIMIT_S) if pending else ([], [])
    for report in ray.get(done):
        say(PREFIX + json.dumps(asdict(report)))
    for reference in late:
        say(f"node {pending[reference]} did not answer within {_NODE_LIMIT_S:.0f} s")
    if not late:
        say("probe is complete")
    return 1 if late else 0


def look(request: Request, node: str) -> NodeReport:
    """Return what this machine has and sees."""
    return NodeReport(
        node,
        versions(),
        {place: _digest(place) for place in request.data},
        _storage(request),
        _tracking(request.tracking_uri),
    )


def _look_on(node: dict[str, str], request: Request) -> "ray.ObjectRef[NodeReport]":
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return (
        ray.remote(look).options(num_cpus=0, scheduling_strategy=strategy).remote(request, node["NodeManagerAddress"])
    )


def _digest(place: str) -> str:
    try:
        return load_manifest(place).digest
    except (DabError, OSError) as error:
        return f"! {error}"


def _storage(request: Request) -> str:
    try:
        folder = RunFolder.of(request.storage)
        if folder.load_json(request.marker).get("text") != request.text:
            return "it does not hold what was written here"
        own = f"{request.marker}-{secrets.token_hex(4)}"
        folder.leave_json(own, {"text": request.text})
        folder.remove(own)
    except (DabError, OSError) as error:
        return str(error)
    return ""


def _tracking(uri: str) -> str:
    try:
        return "" if is_reachable(uri, timeout_s=8) else "no answer"
    except DabError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
