"""What can be asked of a cluster in one second, before anything is sent to it: is it there, may we, is it the same Ray.

Leaves out what only a program on its nodes can tell (`orchestrator.probe`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dabnn.errors import DabError, InvalidInputError
from orchestrator import processes
from orchestrator.capacity import Node
from orchestrator.jobs_api import CONNECT_S, headers, wrong_token
from orchestrator.target import Target

_ANSWER_S = 15.0
_MAX_NODES = 10_000
_UNAUTHORIZED, _FORBIDDEN = 401, 403
_GATEWAY = (502, 503, 504)


@dataclass(frozen=True)
class Reached:
    """A cluster that answered.

    Attributes:
        ray_version: Its Ray.
        session: Which start of it this is.
        nodes: Its nodes that are alive.
    """

    ray_version: str
    session: str
    nodes: tuple[Node, ...]

    @property
    def total(self) -> dict[str, float]:
        """What its nodes have together, by Ray's names."""
        kinds = {kind for node in self.nodes for kind in node.resources}
        return {kind: sum(node.resources.get(kind, 0) for node in self.nodes) for kind in kinds}


def reach(target: Target) -> Reached:
    """Return what a cluster says of itself.

    Raises:
        DabError: Nothing answers within two seconds.
        InvalidInputError: What answers is no Ray cluster, runs another Ray, refuses the token or takes commands from
            anyone.
    """
    if not target.is_embedded and not target.is_open:
        _refuse_open(target)
    answer = _json(target, "/api/version")
    theirs, ours = answer.get("ray_version"), version("ray")
    if not isinstance(theirs, str):
        raise _no_jobs_api(target)
    if theirs != ours:
        raise InvalidInputError(
            f"versions: {target} runs Ray {theirs}, this machine has {ours}. Ray speaks to its own version only: "
            "install the same one on both."
        )
    return Reached(theirs, str(answer.get("session_name", "")), nodes_of(target))


def nodes_of(target: Target) -> tuple[Node, ...]:
    """Return the nodes of a cluster that are alive.

    Raises:
        DabError: It does not answer.
    """
    answer = _json(target, f"/api/v0/nodes?detail=1&limit={_MAX_NODES}")
    found = ((answer.get("data") or {}).get("result") or {}).get("result") or []
    return tuple(
        Node(node["node_ip"], node.get("resources_total") or {}, node.get("labels") or {})
        for node in found
        if node["state"] == "ALIVE"
    )


def _refuse_open(target: Target) -> None:
    """Refuse a cluster where whoever reaches the port can run programs; a token sent there would protect nothing."""
    if "ray_version" in _mapping(_get(target, "/api/version", {})):
        raise InvalidInputError(
            f"--address: {target} at {target.jobs_url} takes commands without a token, from anyone who reaches it. "
            "Start it with RAY_AUTH_MODE=token on every node (docs/clusters.md), or, where something else keeps "
            "others out, accept that with `dab cluster add NAME --address URL --open`."
        )


def _json(target: Target, path: str) -> Mapping[str, Any]:
    response = _get(target, path, headers(target))
    if response.status_code in (_UNAUTHORIZED, _FORBIDDEN):
        raise wrong_token(target)
    answer = _mapping(response)
    if not answer:
        raise _no_jobs_api(target, f" (it answered {response.status_code})")
    return answer


def _mapping(response: Any) -> Mapping[str, Any]:
    """Return the JSON mapping that was answered; an empty one for anything else."""
    try:
        answer = response.json() if response.ok else None
    except ValueError:
        answer = None
    return answer if isinstance(answer, Mapping) else {}


def _get(target: Target, path: str, sent: Mapping[str, str]) -> Any:
    import requests

    os.environ.update(processes.without_proxies(os.environ))
    url = target.jobs_url
    try:
        response = requests.get(url + path, headers=dict(sent), timeout=(CONNECT_S, _ANSWER_S), verify=target.verify)
    except requests.exceptions.SSLError as error:
        raise DabError(
            f"--address: {target} at {url} shows a certificate that this machine does not trust ({_reason(error)}). "
            'Name the file of the authority that signed it: verify = "ca.pem" in clusters.toml.'
        ) from error
    except OSError as error:  # of requests, too; also a file of certificates that is not there
        raise _silent(target, _reason(error)) from error
    if response.status_code in _GATEWAY:
        raise _silent(target, f"a proxy or gateway answered {response.status_code} in its place")
    return response


def _silent(target: Target, reason: str) -> DabError:
    return DabError(
        f"--address: {target} at {target.jobs_url} does not answer ({reason}). Is the cluster up, and is this the "
        "address of its dashboard (port 8265 by default), through a tunnel or https if it listens on loopback?"
    )


def _reason(error: BaseException) -> str:
    """Return the innermost reason: the errors of requests wrap those of urllib3, which wrap the system's."""
    text = str(error)
    for known in (
        "Connection refused",
        "timed out",
        "Name or service not known",
        "CERTIFICATE_VERIFY_FAILED",
        "No route",
    ):
        if known in text:
            return known
    return text[:200]


def _no_jobs_api(target: Target, found: str = "") -> InvalidInputError:
    return InvalidInputError(
        f"--address: {target.jobs_url} is no Jobs API of a Ray cluster{found}. The address is that of Ray's "
        "dashboard, http://HOST:8265 by default."
    )
