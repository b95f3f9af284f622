"""The embedded Ray cluster: one node on this machine, started when needed, found again, ended by `dab cluster down`.

Leaves out clusters elsewhere (`orchestrator.target`). Whoever can reach Ray's ports could run programs as
you, so token authentication is always on, the dashboard listens on loopback only, and the node's address is a loopback.
"""

import http.client
import json
import os
import secrets
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dabnn.errors import InvalidInputError
from orchestrator import processes
from orchestrator.home import home, home_folder, write_private
from orchestrator.processes import OnWait, Server

# Not 127.0.0.1, which Ray replaces by the address of a network card; so the cluster survives a change of network.
_NODE_IP = "127.0.0.2"
_WORKER_PORTS = range(10002, 20000)
_GRACE_S = 15.0
_OBJECT_STORE_BYTES = 200_000_000  # images come from shards and gradients go through gloo or NCCL: it holds little
_MIN_CPUS = 4
_MAX_TEMP_PATH = 40  # the socket's path adds up to 67 bytes; the limit is 107
_FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE", "RAY_TMPDIR")


@dataclass(frozen=True)
class Cluster:
    """The embedded cluster.

    Attributes:
        address: `ip:port` of Ray's control service; what RAY_ADDRESS takes.
        dashboard_url: Dashboard and Jobs API.
        num_cpus: CPUs that it hands out.
        token_path: File with the token that every request needs.
        session_folder: Ray's session files, in the system's temporary folder.
        pid: Its first process.
        started_at: Seconds since 1970.
    """

    address: str
    dashboard_url: str
    num_cpus: int
    token_path: Path
    session_folder: Path
    pid: int
    started_at: float


@dataclass(frozen=True)
class ClusterStatus:
    """What is known of the embedded cluster.

    Attributes:
        state: `running`; `silent`, its process runs but does not answer; or `stopped`.
        cluster: None when stopped.
        pids: All of its processes, those of jobs included.
    """

    state: Literal["running", "silent", "stopped"]
    cluster: Cluster | None
    pids: tuple[int, ...]


def ensure_cluster(
    *,
    num_cpus: int | None = None,
    port: int | None = None,
    dashboard_port: int | None = None,
    on_wait: OnWait | None = None,
) -> Cluster:
    """Return the embedded cluster, started first if it does not run; safe to call from several programs at once.

    Args:
        num_cpus: CPUs to hand out, at least 1; a running cluster keeps its own. Default: the logical CPUs that this
            process may use, at least 4, so that two workers and the driver of a sweep fit on a small machine: Ray
            counts CPUs, it does not fence them off.
        port: Port of the control service. Default: a free one.
        dashboard_port: Port of dashboard and Jobs API. Default: a free one.
        on_wait: Called about once a second while waiting.

    Raises:
        InvalidInputError: A port is taken, or the cluster already runs on another one.
        DabError: It did not start; the message holds the end of its log. No process of it is left.
    """
    folder = home()
    record = folder / "cluster.json"
    with processes.locked(folder / "cluster.lock", on_wait):
        server = processes.recorded(record)
        if server is not None and processes.is_alive(server):
            cluster = _cluster(server, folder)
            _refuse_other_ports(server, port=port, dashboard_port=dashboard_port)
            processes.wait_until_ready(server, lambda: _is_up(cluster), on_wait=on_wait)
            return cluster
        if server is not None:
            _clear(server, record)
        return _start(folder, record, num_cpus=num_cpus, port=port, dashboard_port=dashboard_port, on_wait=on_wait)


def cluster_down(*, on_wait: OnWait | None = None) -> bool:
    """End the embedded cluster with all its jobs and forget it; return whether it was running.

    Only processes of our own cluster are ended, never another Ray. Ray's logs are kept in `DAB_HOME/logs/ray-session`.
    """
    folder = home()
    record = folder / "cluster.json"
    with processes.locked(folder / "cluster.lock", on_wait):
        server = processes.recorded(record)
        if server is None:
            return False
        was_running = processes.is_alive(server)
        _clear(server, record)
        return was_running


def find_cluster() -> Cluster | None:
    """Return the embedded cluster if its process runs; starts nothing and does not ask whether it answers."""
    folder = home()
    server = processes.recorded(folder / "cluster.json")
    return _cluster(server, folder) if server is not None and processes.is_alive(server) else None


def cluster_status() -> ClusterStatus:
    """Return whether the embedded cluster runs and answers; starts and changes nothing."""
    cluster = find_cluster()
    server = processes.recorded(home() / "cluster.json")
    if cluster is None or server is None:
        return ClusterStatus("stopped", None, ())
    pids = tuple(process.pid for process in processes.members(server))
    return ClusterStatus("running" if _is_up(cluster) else "silent", cluster, pids)


def client_env(address: str, dashboard_url: str, token_path: Path) -> dict[str, str]:
    """Return the environment variables that let a program talk to a cluster; to be set before it imports ray."""
    return {
        "RAY_ADDRESS": address,
        "RAY_API_SERVER_ADDRESS": dashboard_url,
        **_ray_env(token_path),
        **processes.without_proxies(os.environ),
    }


def _start(
    folder: Path,
    record: Path,
    *,
    num_cpus: int | None,
    port: int | None,
    dashboard_port: int | None,
    on_wait: OnWait | None,
) -> Cluster:
    for option, given in (("port", port), ("dashboard_port", dashboard_port)):
        if given is not None:
            processes.check_port(f"cluster {option}", given, reserved=_WORKER_PORTS)
    if num_cpus is not None and num_cpus < 1:
        raise InvalidInputError(f"cluster num_cpus: {num_cpus} is less than 1; no job could start.")
    token_path = _ensure_token(folder)
    free = processes.free_ports(7)
    details: dict[str, str | int] = {
        "port": port or free.pop(),
        "dashboard_port": dashboard_port or free.pop(),
        "num_cpus": num_cpus or max(_MIN_CPUS, len(os.sched_getaffinity(0))),
        "session_folder": str(_new_session_folder()),
    }
    server = processes.start(
        "the Ray cluster",
        _command(details, free),
        env=_server_env(token_path) | {"DASHBOARD_METRIC_PORT": str(free[-1])},
        log=home_folder("logs") / "ray.log",
        record=record,
        details=details,
    )
    cluster = _cluster(server, folder)
    try:
        processes.wait_until_ready(server, lambda: _is_up(cluster), on_wait=on_wait)
    except BaseException:
        _clear(server, record)
        raise
    return cluster


def _command(details: dict[str, str | int], free: list[int]) -> list[str]:
    """Return the command that starts the node, every port of it explicit, so that two clusters do not meet."""
    options = {
        "temp-dir": details["session_folder"],
        "node-ip-address": _NODE_IP,
        "port": details["port"],
        "num-cpus": details["num_cpus"],
        "object-store-memory": _OBJECT_STORE_BYTES,
        "include-dashboard": True,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": details["dashboard_port"],
        "dashboard-agent-listen-port": free[0],
        "dashboard-agent-grpc-port": free[1],
        "runtime-env-agent-port": free[2],
        "metrics-export-port": free[3],
        "log-style": "record",
        "log-color": False,
    }
    launcher = Path(__file__).with_name("ray_head.py")
    # -P: the launcher's folder stays off the import path, where our `config` or `job` could shadow another module.
    command = [sys.executable, "-P", str(launcher), "start", "--head", "--block", "--no-monitor"]
    return command + [f"--{name}={value}" for name, value in options.items()]


def _clear(server: Server, record: Path) -> None:
    """End what is left of a cluster, keep Ray's logs, and remove its session files and its record."""
    processes.end(server, grace_s=_GRACE_S)
    session_folder = Path(str(server.details["session_folder"]))
    logs = session_folder / "session_latest" / "logs"
    if logs.is_dir():
        kept = home_folder("logs") / "ray-session"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept, ignore_dangling_symlinks=True)
    shutil.rmtree(session_folder, ignore_errors=True)
    record.unlink(missing_ok=True)


def _cluster(server: Server, folder: Path) -> Cluster:
    return Cluster(
        address=f"{_NODE_IP}:{server.details['port']}",
        dashboard_url=f"http://127.0.0.1:{server.details['dashboard_port']}",
        num_cpus=int(server.details["num_cpus"]),
        token_path=folder / "ray_token",
        session_folder=Path(str(server.details["session_folder"])),
        pid=server.pid,
        started_at=server.created_at,
    )


def _refuse_other_ports(server: Server, **wanted: int | None) -> None:
    for option, port in wanted.items():
        if port is not None and port != server.details[option]:
            raise InvalidInputError(
                f"cluster {option}: {port} was asked for, but the cluster already runs on {server.details[option]}; "
                "leave the option out, or end the cluster first with `dab cluster down`."
            )


def _is_up(cluster: Cluster) -> bool:
    """Return whether the Jobs API answers and the node is registered, which takes seconds longer."""
    answer = _get(cluster, "/api/v0/nodes")
    nodes = answer["data"]["result"]["result"] if answer is not None and answer.get("data") else []
    return any(node["state"] == "ALIVE" for node in nodes)


def _get(cluster: Cluster, path: str) -> dict[str, Any] | None:
    connection = http.client.HTTPConnection(cluster.dashboard_url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", path, headers={"authorization": f"Bearer {_token(cluster)}"})
        response = connection.getresponse()
        body = response.read()
        answer = json.loads(body) if response.status == http.client.OK else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else None


def _token(cluster: Cluster) -> str:
    return cluster.token_path.read_text(encoding="ascii").strip()


def _ensure_token(folder: Path) -> Path:
    """Return the token's file, created if missing: our own, since Ray's would lie in `~/.ray` and readable by all."""
    path = folder / "ray_token"
    if not path.exists():
        write_private(path, secrets.token_hex(32))
    path.chmod(0o600)
    return path


def _ray_env(token_path: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # lines that look alike, as progress lines do, would be swallowed
    }


def _server_env(token_path: Path) -> dict[str, str]:
    """Return the environment of the cluster and so of its jobs: the caller's, less what points at another Ray."""
    return {
        **{name: value for name, value in os.environ.items() if name not in _FOREIGN},
        **_ray_env(token_path),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # by default SIGTERM takes 30 s
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def session_parent() -> Path:
    """Return where Ray's session files go: the system's temporary folder, or /tmp where that leaves sockets no room."""
    system = tempfile.gettempdir()
    return Path(system if len(system) + 17 <= _MAX_TEMP_PATH else "/tmp")  # noqa: S108


def _new_session_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="dab-ray-", dir=session_parent()))
