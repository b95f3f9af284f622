"""Servers of ours on this machine: started in a session of their own, found again by their record, ended altogether.

A server outlives the program that started it, and Ctrl-C in a terminal does not reach it. Leaves out what the servers
are: `cluster` and `tracking_server` say how each is started and asked whether it is well.
"""

import contextlib
import fcntl
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from dabnn.errors import DabError, InvalidInputError
from orchestrator.home import read_record, write_private

OnWait = Callable[[str], None]
"""Called about once a second with what is waited for, for a progress line."""

_MARKER = "DAB_SERVER"  # inherited by all that a server starts, also by jobs, which Ray puts into sessions of their own
_CLOCK_TOLERANCE_S = 2.0  # psutil derives creation times from the boot time, which moves when the clock is set
_READY_TIMEOUT_S = 90.0
_FREE_PORTS = range(20000, 32768)  # above Ray's worker ports (10002-19999), below the kernel's for outgoing connections


@dataclass(frozen=True)
class Server:
    """A server that was started on this machine.

    Attributes:
        title: What messages call it.
        pid: Its first process, which leads its session.
        created_at: When that process was created, seconds since 1970; tells it from a later process with the same pid.
        marker: Value of an environment variable that all its processes have inherited.
        log: File with what its first process printed.
        details: What its owner needs to find it again: ports, folders.
    """

    title: str
    pid: int
    created_at: float
    marker: str
    log: str
    details: dict[str, str | int]


def start(
    title: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path,
    record: Path,
    details: dict[str, str | int],
) -> Server:
    """Start a server in a session of its own, in the folder of its record, and record it.

    Args:
        title: What messages call it.
        command: Program and arguments.
        env: Its whole environment.
        log: File for what it prints; an earlier one is overwritten.
        record: JSON file to write.
        details: Kept in the record for the caller.
    """
    marker = secrets.token_hex(8)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=record.parent, env={**env, _MARKER: marker}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    process.returncode = 0  # it shall outlive us: without this Popen warns of a child that nobody waited for
    server = Server(title, process.pid, psutil.Process(process.pid).create_time(), marker, str(log), details)
    try:
        write_private(record, json.dumps(asdict(server)))
    except BaseException:
        end(server, grace_s=0)
        raise
    return server


def recorded(record: Path) -> Server | None:
    """Return the server in a record, running or not; None without a usable record."""
    fields = read_record(record)
    try:
        return None if fields is None else Server(**fields)
    except TypeError:  # written by another version: its server cannot be found this way
        return None


def is_alive(server: Server) -> bool:
    """Return whether the server's first process still runs."""
    try:
        process = psutil.Process(server.pid)
        is_same = abs(process.create_time() - server.created_at) < _CLOCK_TOLERANCE_S
        if not is_same or process.status() != psutil.STATUS_ZOMBIE:
            return is_same
    except psutil.NoSuchProcess:
        return False
    with contextlib.suppress(ChildProcessError):
        os.waitpid(server.pid, os.WNOHANG)
    return False


def members(server: Server) -> list[psutil.Process]:
    """Return the living processes of a server: those in its session and those that carry its marker."""
    is_leader_known = is_alive(server) or not psutil.pid_exists(
        server.pid
    )  # else the pid, and its session, are another's
    return [
        process
        for process in psutil.process_iter()
        if ((is_leader_known and _session(process) == server.pid) or _marker(process) == server.marker)
        and not _is_zombie(process)  # one whose parent never waits for it, as in some containers, cannot be ended
    ]


def end(server: Server, *, grace_s: float) -> None:
    """End a server: ask its first process to stop it, then kill what is left after `grace_s` seconds.

    Raises:
        DabError: A process of it cannot be killed.
    """
    if is_alive(server):
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGTERM)
        _wait_until_gone(server, grace_s)
    for process in members(server):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if left := _wait_until_gone(server, 5.0):
        names = ", ".join(f"{process.pid}" for process in left)
        raise DabError(
            f"{server.title}: process {names} does not end even when killed; it may wait for a disk that is gone."
        )


def wait_until_ready(server: Server, is_ready: Callable[[], bool], *, on_wait: OnWait | None) -> None:
    """Wait until `is_ready()`, for at most 90 s.

    Raises:
        DabError: The server ended or was not ready in time; the message holds the end of its log.
    """
    begin = time.monotonic()
    reported_s = 0
    while not is_ready():
        waited_s = time.monotonic() - begin
        if not is_alive(server):
            raise DabError(f"{server.title}: ended while it started. {_log_tail(server)}")
        if waited_s > _READY_TIMEOUT_S:
            raise DabError(
                f"{server.title}: process {server.pid} gave no answer within {waited_s:.0f} s; `dab cluster down` "
                f"ends what is left of it. {_log_tail(server)}"
            )
        if on_wait is not None and int(waited_s) > reported_s:
            reported_s = int(waited_s)
            on_wait(f"waiting for {server.title} ({reported_s} s)")
        time.sleep(0.2)


@contextlib.contextmanager
def locked(path: Path, on_wait: OnWait | None) -> Iterator[None]:
    """Hold a lock between processes within the block; the kernel frees it if the holder dies."""
    with path.open("w") as file:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if on_wait is not None:
                    on_wait(f"waiting for another dab that holds {path.name} ({time.monotonic() - begin:.0f} s)")
                time.sleep(0.5)
        yield


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens, outside the ranges from which Ray and the kernel hand out ports."""
    candidates = random.sample(_FREE_PORTS, k=len(_FREE_PORTS))
    found = [port for port in candidates[: 50 * count] if is_free(port)][:count]
    if len(found) < count:
        raise DabError(
            f"ports: only {len(found)} of {50 * count} tried from {_FREE_PORTS.start} on are free; {count} are needed."
        )
    return found


def check_port(option: str, port: int, *, reserved: range | None = None) -> None:
    """Refuse a port that a server of ours cannot listen on.

    Raises:
        InvalidInputError: Out of range, reserved, or taken; the message starts with `option` and says by whom.
    """
    if not 1024 <= port <= 65535:
        raise InvalidInputError(f"{option}: {port} is no port for a server; use one from 1024 to 65535.")
    if reserved is not None and port in reserved:
        limits = f"{reserved.start}-{reserved.stop - 1}"
        raise InvalidInputError(f"{option}: {port} lies in {limits}, which Ray gives to its workers; use one outside.")
    if not is_free(port):
        raise InvalidInputError(
            f"{option}: {port} is taken by {_listener(port)}; choose another port or end that program."
        )


def without_proxies(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep requests to this machine from going to a web proxy; none where no proxy is set."""
    if not any(name.lower().endswith("_proxy") for name in env):
        return {}
    hosts = ["127.0.0.1", "127.0.0.2", "localhost"]
    known = env.get("no_proxy") or env.get("NO_PROXY") or ""
    value = ",".join([*filter(None, known.split(",")), *(host for host in hosts if host not in known.split(","))])
    return {"no_proxy": value, "NO_PROXY": value}


def _wait_until_gone(server: Server, timeout_s: float) -> list[psutil.Process]:
    """Return what is left of a server after at most `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = members(server)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _marker(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(_MARKER)
    except (psutil.Error, OSError):  # gone, a zombie, or another user's
        return None


def _log_tail(server: Server, num_lines: int = 15) -> str:
    try:
        lines = Path(server.log).read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
    except FileNotFoundError:
        lines = []
    return f"The end of its log {server.log}:\n" + "\n".join(f"    {line}" for line in lines or ["(empty)"])


def is_free(port: int) -> bool:
    """Return whether nothing listens on a port of this machine, on any address."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the servers do: closed connections do not block
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 - nothing listens: a port taken on any address is refused
        except OSError:
            return False
        return True


def _listener(port: int) -> str:
    """Return who listens on a port, in words."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp"):
            is_listener = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if is_listener and connection.pid is not None:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "another program"
