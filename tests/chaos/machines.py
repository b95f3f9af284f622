"""Machines made of namespaces on this one: own network card, address, host name, processes, disk and shared memory.

They hang on one switch and see nothing else, so nothing here listens where anyone could connect from outside, and the
machine that runs the tests keeps no trace: interfaces and processes live in the namespaces and end with them, also when
the tests are killed. The folder `shared` is the same on all machines, as NFS would be, and so is `small`, which has
room for 8 MB; `here` is the own disk of each.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

_NETWORK = "10.77.0"
_FIRST_HOST = 10
_SHM_SIZE, _SMALL_SIZE = "256m", "8m"
_PROGRAMS = ("ip", "mount", "nsenter", "unshare")

# Becomes the first process of a machine. `cat` ends when whoever started the machine is gone, however that came about,
# and the kernel then ends every process of the machine; the shell takes in what is orphaned there.
_BOOT = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
mount --bind "$2/disks/$1" "$2/here"
mount -t tmpfs -o size="$3" shm /dev/shm
echo ready
cat > /dev/null
exit 0
"""

# Holds the network between the machines, and a shared folder of little room.
_SWITCH = """
set -e
ip link add switch type bridge
ip link set switch up
mount -t tmpfs -o size="$2" small "$1"
echo ready
exec cat
"""


def why_no_machines() -> str:
    """Return why machines cannot be made here, or nothing."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)} (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root, and this is another user"
    tried = subprocess.run(_unshare("true"), capture_output=True, text=True, check=False)
    return f"network namespaces are refused here: {tried.stderr.strip()}" if tried.returncode else ""


def _unshare(*command: str) -> list[str]:
    kinds = ["--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc"]
    return ["unshare", *kinds, "--fork", "--kill-child", *command]


class Machine:
    """One machine on a switch.

    Attributes:
        name: Host name.
        address: IPv4 address.
        disk: Its disk, as it is seen from outside; inside it is `Network.here`.
    """

    def __init__(self, network: "Network", name: str, address: str) -> None:
        self.name, self.address = name, address
        self.disk = network.base / "disks" / name
        self._network = network
        self._boot: subprocess.Popen[str] | None = None
        self._init = 0

    @property
    def is_on(self) -> bool:
        """Whether it has power."""
        return self._boot is not None and self._boot.poll() is None

    def power_on(self) -> None:
        """Boot with an empty process table; the disk is as it was."""
        assert not self.is_on
        self.disk.mkdir(parents=True, exist_ok=True)
        log = self._network.base / f"{self.name}.boot"
        with log.open("w") as errors:
            command = self._network.beside(
                _unshare("sh", "-c", _BOOT, "boot", self.name, str(self._network.base), _SHM_SIZE)
            )
            boot = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        assert boot.stdout is not None
        assert boot.stdout.readline() == "ready\n", f"{self.name}: did not boot: {log.read_text()}"
        (init,) = psutil.Process(boot.pid).children()
        self._boot, self._init = boot, init.pid
        self._network.connect(self, init.pid)
        for command in (
            ["ip", "link", "set", "lo", "up"],
            ["ip", "link", "set", "eth0", "address", f"02:00:00:00:00:{int(self.address.rsplit('.', 1)[1]):02x}"],
            ["ip", "addr", "add", f"{self.address}/24", "dev", "eth0"],
            ["ip", "link", "set", "eth0", "up"],
            ["ip", "route", "add", "default", "via", f"{_NETWORK}.1"],
        ):
            self.run(command)

    def power_off(self) -> None:
        """Take the power away: every process ends at once, nothing is cleaned up."""
        if self._boot is None:
            return
        if self.is_on:
            os.kill(self._init, 9)
        self._boot.wait()
        for pipe in (self._boot.stdin, self._boot.stdout):
            assert pipe is not None
            pipe.close()
        self._boot = None

    def unplug(self) -> None:
        """Pull the network cable at the switch: packets vanish, and the machine is told nothing."""
        self._network.at_switch(["ip", "link", "set", self.name, "nomaster"])

    def plug_in(self) -> None:
        """Put the network cable back."""
        self._network.at_switch(["ip", "link", "set", self.name, "master", "switch"])

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, log: Path | None = None
    ) -> "subprocess.Popen[str]":
        """Start a program; without `log` its output is piped."""
        output: int | IO[str] = subprocess.PIPE if log is None else log.open("a")
        try:
            return subprocess.Popen(
                self._inside(command), env=env, text=True, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
            )  # fmt: skip
        finally:
            if not isinstance(output, int):
                output.close()

    def run(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 60) -> str:
        """Run a program that must succeed and return what it printed."""
        done = subprocess.run(
            self._inside(command), env=env, text=True, capture_output=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}: {done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """Return its living processes, without those that keep the machine itself."""
        if not self.is_on:
            return []
        space = _pid_space(self._init)
        keepers = {self._init, *(child.pid for child in psutil.Process(self._init).children() if child.name() == "cat")}
        found = (psutil.Process(pid) for pid in _pids() if pid not in keepers and _pid_space(pid) == space)
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def _inside(self, command: Sequence[str]) -> list[str]:
        kinds = ["--net", "--mount", "--uts", "--ipc", "--pid"]
        move = ["sh", "-c", 'cd "$0" && exec "$@"', str(self._network.here)]
        return ["nsenter", "--target", str(self._init), *kinds, "--", *move, *command]


class Network:
    """Machines on one switch, all of them on while this is entered."""

    def __init__(self, base: Path, names: Sequence[str]) -> None:
        self.base = base
        self.here, self.shared, self.small = base / "here", base / "shared", base / "small"
        addresses = {name: f"{_NETWORK}.{_FIRST_HOST + place}" for place, name in enumerate(names)}
        self.machines = {name: Machine(self, name, address) for name, address in addresses.items()}
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        for folder in (self.here, self.shared, self.small):
            folder.mkdir(parents=True)
        hosts = [f"{machine.address} {machine.name}" for machine in self.machines.values()]
        (self.base / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        (self.base / "resolv.conf").write_text("")
        self._switch = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", _SWITCH, "switch", str(self.small), _SMALL_SIZE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd="/",
        )  # fmt: skip
        try:
            assert self._switch.stdout is not None
            assert self._switch.stdout.readline() == "ready\n", "the switch did not start"
            for machine in self.machines.values():
                machine.power_on()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the power away from all machines and the switch; disks stay."""
        for machine in self.machines.values():
            machine.power_off()
        if self._switch is not None:
            self._switch.communicate(timeout=10)  # its input ends, and so does it
            self._switch = None

    def connect(self, machine: Machine, pid: int) -> None:
        """Lay a cable from the switch to the network namespace of a process."""
        name, deadline = machine.name, time.monotonic() + 10
        while True:  # the old cable of a machine that lost its power goes away in the background
            try:
                self.at_switch(["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(pid)])
                break
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        self.at_switch(["ip", "link", "set", name, "master", "switch", "up"])

    @property
    def small_outside(self) -> Path:
        """The folder `small` as it is seen from outside."""
        assert self._switch is not None
        return Path(f"/proc/{self._switch.pid}/root{self.small}")

    def beside(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs among the mounts and in the network of the switch."""
        assert self._switch is not None
        return ["nsenter", "--target", str(self._switch.pid), "--net", "--mount", "--", *command]

    def at_switch(self, command: Sequence[str]) -> None:
        """Run a command at the switch."""
        done = subprocess.run(self.beside(command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"switch: {' '.join(command)}: {done.stderr}"


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names, not paths


def _pid_space(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino  # noqa: PTH116 - follows a link that has no path
    except OSError:
        return None
