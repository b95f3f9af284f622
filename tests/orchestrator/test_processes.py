import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dabnn.errors import DabError, InvalidInputError
from orchestrator import processes
from orchestrator.processes import Server

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
subprocess.Popen(["sleep", "600"])
print("up", flush=True)
time.sleep(600)
"""


def start(folder: Path, code: str) -> Server:
    return processes.start(
        "the test server",
        [sys.executable, "-c", code],
        env=os.environ,
        log=folder / "server.log",
        record=folder / "server.json",
        details={"port": 1},
    )


def wait_for_log(server: Server, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in Path(server.log).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[Server]:
    server = start(tmp_path, STUBBORN)
    wait_for_log(server, "up")
    yield server
    processes.end(server, grace_s=0)


def test_a_server_is_found_again_by_its_record(stubborn: Server, tmp_path: Path) -> None:
    assert processes.recorded(tmp_path / "server.json") == stubborn
    assert processes.is_alive(stubborn)
    assert os.getsid(stubborn.pid) == stubborn.pid != os.getsid(0)


def test_end_reaches_children_that_left_the_session_and_ignore_the_request(stubborn: Server) -> None:
    members = processes.members(stubborn)
    assert len(members) == 3
    processes.end(stubborn, grace_s=0.2)
    assert all(has_ended(member) for member in members)
    assert not processes.is_alive(stubborn)
    processes.end(stubborn, grace_s=0.2)


def test_end_reaches_children_whose_server_died(stubborn: Server) -> None:
    members = processes.members(stubborn)
    psutil.Process(stubborn.pid).kill()
    psutil.wait_procs([member for member in members if member.pid == stubborn.pid], timeout=5)
    processes.end(stubborn, grace_s=0.2)
    assert all(has_ended(member) for member in members)


def test_a_dead_child_that_nobody_waits_for_is_no_member(tmp_path: Path) -> None:
    code = "import subprocess, time; child = subprocess.Popen(['true']); time.sleep(1); print('up', flush=True)"
    server = start(tmp_path, f"{code}; time.sleep(600)")
    wait_for_log(server, "up")
    assert [member.pid for member in processes.members(server)] == [server.pid]
    processes.end(server, grace_s=5)


def test_another_program_with_the_same_pid_is_neither_found_nor_ended(stubborn: Server) -> None:
    bystander = dataclasses.replace(stubborn, created_at=stubborn.created_at - 1000, marker="another")
    assert not processes.is_alive(bystander)
    assert processes.members(bystander) == []
    processes.end(bystander, grace_s=0)
    assert processes.is_alive(stubborn)


def test_a_record_of_another_version_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text('{"pid": 1}')
    assert processes.recorded(tmp_path / "server.json") is None


def test_a_server_that_ends_while_it_starts_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = start(tmp_path, "print('no room on the moon')")
    with pytest.raises(DabError, match=r"(?s)the test server: ended while it started.*server.log.*no room on the moon"):
        processes.wait_until_ready(server, lambda: False, on_wait=None)


def test_waiting_is_reported_once_a_second(stubborn: Server) -> None:
    ready_at = time.monotonic() + 1.5
    reports: list[str] = []
    processes.wait_until_ready(stubborn, lambda: time.monotonic() > ready_at, on_wait=reports.append)
    assert reports == ["waiting for the test server (1 s)"]


def test_a_lock_is_held_by_one_at_a_time_and_says_who_waits(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with processes.locked(tmp_path / "x.lock", order.append):
            order.append("second")

    with processes.locked(tmp_path / "x.lock", None):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order[0].startswith("waiting for another dab that holds x.lock")
    assert order[-2:] == ["first", "second"]


def test_a_lock_of_a_killed_program_is_free(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from orchestrator.processes import locked\n"
    code += "with locked(Path(sys.argv[1]), None): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x.lock")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
    with processes.locked(tmp_path / "x.lock", None):
        pass


def test_free_ports_differ_and_lie_outside_the_ranges_of_ray_and_the_kernel() -> None:
    ports = processes.free_ports(20)
    assert len(set(ports)) == 20
    assert all(20000 <= port < 32768 and processes.is_free(port) for port in ports)


def test_a_taken_port_names_who_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InvalidInputError, match=rf"^cluster port: {port} is taken by .*\(process {os.getpid()}\)"):
            processes.check_port("cluster port", port)


@pytest.mark.parametrize("port", [0, 80, 65536, 10002, 19999])
def test_a_port_out_of_range_is_refused(port: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"^cluster port: {port} "):
        processes.check_port("cluster port", port, reserved=range(10002, 20000))


def test_requests_to_this_machine_pass_by_a_proxy() -> None:
    assert processes.without_proxies({"PATH": "/bin"}) == {}
    env = {"https_proxy": "http://proxy:3128", "no_proxy": "intranet,localhost"}
    assert processes.without_proxies(env)["no_proxy"] == "intranet,localhost,127.0.0.1,127.0.0.2"
