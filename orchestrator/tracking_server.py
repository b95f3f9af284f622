"""The MLflow server of this machine: one, on loopback, over sqlite in `DAB_HOME`, shared by all runs and `dab ui`.

Leaves out what is written to it (`orchestrator.tracking`) and servers elsewhere, which `tracking.uri` names.
"""

import http.client
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dabnn.errors import InvalidInputError
from orchestrator import processes
from orchestrator.home import home, home_folder
from orchestrator.processes import OnWait, Server

_GRACE_S = 10.0
_SERVER_ENV = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else 7 more processes, of up to 234 MB each
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class TrackingStatus:
    """What is known of this machine's MLflow server.

    Attributes:
        state: `running`; `silent`, its process runs but does not answer; or `stopped`.
        uri: Its address; None when stopped.
        pids: All of its processes.
    """

    state: Literal["running", "silent", "stopped"]
    uri: str | None
    pids: tuple[int, ...]


def ensure_tracking(*, port: int | None = None, on_wait: OnWait | None = None) -> str:
    """Return the address of this machine's MLflow server, started first if it does not run.

    A server that died is started again on its former port, so that runs which go on find it. Safe to call from several
    programs at once.

    Args:
        port: Port on loopback. Default: the former one, or a free one.
        on_wait: Called about once a second while waiting.

    Raises:
        InvalidInputError: The port is taken, or the server already runs on another one.
        DabError: It did not start; the message holds the end of its log. No process of it is left.
    """
    folder = home()
    record = folder / "tracking.json"
    with processes.locked(folder / "tracking.lock", on_wait):
        server = processes.recorded(record)
        if server is None or not processes.is_alive(server):
            return _start(folder, record, server, port=port, on_wait=on_wait)
        if port is not None and port != server.details["port"]:
            raise InvalidInputError(
                f"tracking port: {port} was asked for, but the server already runs on {server.details['port']}; leave "
                "the option out, or end it first with `dab cluster down`."
            )
        processes.wait_until_ready(server, lambda: _is_up(server), on_wait=on_wait)
        return _uri(server)


def tracking_down(*, on_wait: OnWait | None = None) -> bool:
    """End this machine's MLflow server; return whether it was running. What it has recorded stays."""
    folder = home()
    record = folder / "tracking.json"
    with processes.locked(folder / "tracking.lock", on_wait):
        server = processes.recorded(record)
        if server is None:
            return False
        was_running = processes.is_alive(server)
        processes.end(server, grace_s=_GRACE_S)
        record.unlink(missing_ok=True)
        return was_running


def tracking_status() -> TrackingStatus:
    """Return whether this machine's MLflow server runs; starts and changes nothing."""
    server = processes.recorded(home() / "tracking.json")
    if server is None or not processes.is_alive(server):
        return TrackingStatus("stopped", None, ())
    pids = tuple(process.pid for process in processes.members(server))
    return TrackingStatus("running" if _is_up(server) else "silent", _uri(server), pids)


def _start(folder: Path, record: Path, former: Server | None, *, port: int | None, on_wait: OnWait | None) -> str:
    if former is not None:
        processes.end(former, grace_s=0)
    if port is not None:
        processes.check_port("tracking port", port)
    elif former is not None and processes.is_free(int(former.details["port"])):
        port = int(former.details["port"])
    else:
        port = processes.free_ports(1)[0]
    database = folder / "mlflow.db"
    is_new = not database.exists()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{database}",
        "--artifacts-destination", str(home_folder("artifacts")),
    ]  # fmt: skip
    server = processes.start(
        "the MLflow server",
        command,
        env={name: value for name, value in os.environ.items() if "MLFLOW_" not in name} | _SERVER_ENV,
        log=home_folder("logs") / "mlflow.log",
        record=record,
        details={"port": port},
    )
    try:
        processes.wait_until_ready(server, lambda: _is_up(server), on_wait=on_wait)
    except BaseException:
        processes.end(server, grace_s=_GRACE_S)
        if is_new:  # one whose tables are half made would stop every later start
            for path in folder.glob("mlflow.db*"):  # its journal would be applied to the next one
                path.unlink()
        record.unlink(missing_ok=True)
        raise
    return _uri(server)


def _uri(server: Server) -> str:
    return f"http://127.0.0.1:{server.details['port']}"


def _is_up(server: Server) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", int(server.details["port"]), timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
