"""The MLflow server of this machine: one, shared by all runs and `dab ui`.

It listens on loopback and keeps runs in sqlite in `DAB_HOME`, unless `tracking.toml` says otherwise
(`orchestrator.tracking_settings`); beyond loopback it asks for a password. Files go through it, so that who writes them
needs no credentials of the store behind it. Leaves out what is written to it (`orchestrator.tracking`) and servers
elsewhere, which `tracking.uri` names.
"""

import http.client
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from dabnn.errors import DabError, InvalidInputError
from orchestrator import processes
from orchestrator.home import home, home_folder, home_path
from orchestrator.processes import OnWait, Server
from orchestrator.tracking_password import PASSWORD_FILE, USER, server_environment
from orchestrator.tracking_settings import FILE, TrackingSettings, tracking_settings

_GRACE_S = 10.0
_SERVER_ENV = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else 7 more processes, of up to 234 MB each
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "PYTHONWARNINGS": "ignore",
    # Connections for all 40 threads of the server: with 15, as by default, requests of hundreds of trials at once wait
    # for one until they fail.
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "40",
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "10",
}


@dataclass(frozen=True)
class TrackingStatus:
    """What is known of this machine's MLflow server.

    Attributes:
        state: `running`; `silent`, its process runs but does not answer; or `stopped`.
        uri: Its address; None when stopped.
        pids: All of its processes.
        user: Who it knows, with the password of `password_file`; None where it lets all in, as it does on loopback.
        password_file: File that holds the password.
    """

    state: Literal["running", "silent", "stopped"]
    uri: str | None
    pids: tuple[int, ...]
    user: str | None = None
    password_file: str | None = None


def ensure_tracking(*, port: int | None = None, on_wait: OnWait | None = None) -> str:
    """Return the address of this machine's MLflow server, started first if it does not run.

    A server that died is started again on its former port, so that runs which go on find it. Safe to call from several
    programs at once.

    Args:
        port: Port to listen on. Default: that of `tracking.toml`, the former one, or a free one.
        on_wait: Called about once a second while waiting.

    Raises:
        InvalidInputError: The port is taken, the server already runs on another one, or `tracking.toml` is wrong.
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
        try:
            processes.wait_until_ready(server, lambda: _is_up(server), on_wait=on_wait)
        except DabError:
            if processes.is_alive(server):
                raise
            return _start(folder, record, server, port=port, on_wait=on_wait)  # it was dying as we looked
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
    user, file = (USER, str(home() / PASSWORD_FILE)) if _asks_for_password(server) else (None, None)
    return TrackingStatus("running" if _is_up(server) else "silent", _uri(server), pids, user, file)


def is_own_guarded(uri: str) -> bool:
    """Return whether `uri` is the address of this machine's server and that asks for a password."""
    server = processes.recorded(home_path() / "tracking.json")
    return server is not None and _asks_for_password(server) and urlsplit(uri).netloc == urlsplit(_uri(server)).netloc


def _start(folder: Path, record: Path, former: Server | None, *, port: int | None, on_wait: OnWait | None) -> str:
    settings = tracking_settings()
    if former is not None:
        processes.end(former, grace_s=0)
    port = _port(settings, former, port)
    database = folder / "mlflow.db"
    is_new = settings.store is None and not database.exists()
    env = {name: value for name, value in os.environ.items() if "MLFLOW_" not in name} | _SERVER_ENV
    if settings.asks_for_password:
        env |= server_environment(folder)
    server = processes.start(
        "the MLflow server",
        _command(settings, port, database),
        env=env,
        log=home_folder("logs") / "mlflow.log",
        record=record,
        details={"host": settings.local_host, "port": port, "password": int(settings.asks_for_password)},
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


def _port(settings: TrackingSettings, former: Server | None, asked: int | None) -> int:
    """Return the port to listen on.

    Raises:
        InvalidInputError: One that was asked for, here or in the settings, cannot be had.
    """
    for option, port in (("tracking port", asked), (f"{FILE}: port", settings.port)):
        if port is not None:
            processes.check_port(option, port)
            return port
    if former is not None and processes.is_free(int(former.details["port"])):
        return int(former.details["port"])
    return processes.free_ports(1)[0]


def _command(settings: TrackingSettings, port: int, database: Path) -> list[str]:
    guard = (
        ["--app-name", "basic-auth", "--allowed-hosts", settings.host_headers(port)]
        if settings.asks_for_password
        else []
    )
    return [
        sys.executable, "-m", "mlflow", "server", "--host", settings.host, "--port", str(port), "--workers", "1",
        "--backend-store-uri", settings.store_uri or f"sqlite:///{database}",
        "--artifacts-destination", settings.artifacts or str(home_folder("artifacts")),
        *guard,
    ]  # fmt: skip


def _asks_for_password(server: Server) -> bool:
    return bool(server.details.get("password"))


def _host(server: Server) -> str:
    return str(server.details.get("host", "127.0.0.1"))


def _uri(server: Server) -> str:
    return f"http://{_host(server)}:{server.details['port']}"


def _is_up(server: Server) -> bool:
    connection = http.client.HTTPConnection(_host(server), int(server.details["port"]), timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
