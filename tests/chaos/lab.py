"""A cluster of several machines: a head, nodes, one for services, and a desk where `dab` is typed.

The services are the experiment tracker and an object store. Every machine has Ray's token, its own DAB_HOME and its own
temporary folder; the folder `shared` is the storage that all of them see. Ray is started once a node, as an
administrator would; `mend` starts it again where it ended, as a container platform would.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import s3_server
from machines import Machine, Network

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROGRAM = BIN / "dab"
NODES = ("node1", "node2")
SPARE = "node3"
DASHBOARD_PORT = 8265
_CONTROL_PORT = 6379
_TRACKER_PORT, _STORE_PORT = 5000, 9000
_READY_S = 400.0
_FOREIGN = ("RAY_", "MLFLOW_", "DAB_", "AWS_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")

# Prints what a URL answers; run on a machine of the lab, since nothing else reaches it.
_ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"authorization": "Bearer " + open(sys.argv[2]).read().strip()})
sys.stdout.write(urllib.request.urlopen(request, timeout=10).read().decode())
"""


def wait_until(condition: Callable[[], Any], timeout_s: float = 120, poll_s: float = 0.1, *, what: str = "") -> Any:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what or condition}"
        time.sleep(poll_s)
    return value


class Lab:
    """The cluster, all of it running while this is entered.

    Attributes:
        network: The machines.
        node_cpus: CPUs that each node hands out; the head hands out none.
    """

    def __init__(self, base: Path, *, node_cpus: int = 2, nodes: Sequence[str] = NODES) -> None:
        self.network = Network(base, ["head", *NODES, SPARE, "services", "desk"])
        self.node_cpus = node_cpus
        self.token = base / "token"
        self._nodes = list(nodes)
        self._started: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        self.network.__enter__()
        try:
            self.token.touch(0o600)
            self.token.write_text(secrets.token_hex(32))
            for name in self.machines:
                for folder in ("home", "tmp", "ray"):
                    (self.machines[name].disk / folder).mkdir()
            self.bucket.mkdir(parents=True)
            self.start_store()
            self.start_tracker()
            self.start_head()
            for name in self._nodes:
                self.start_node(name)
            self.mend()
            self.name_cluster()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the power away from all machines."""
        self.network.close()
        for process in self._started.values():
            process.wait()

    @property
    def machines(self) -> dict[str, Machine]:
        """All machines by name."""
        return self.network.machines

    @property
    def shared(self) -> Path:
        """The folder that is the same everywhere."""
        return self.network.shared

    @property
    def jobs_url(self) -> str:
        """URL of the Jobs API."""
        return f"http://{self.machines['head'].address}:{DASHBOARD_PORT}"

    @property
    def tracking_uri(self) -> str:
        """URI of the MLflow server."""
        return f"http://{self.machines['services'].address}:{_TRACKER_PORT}"

    @property
    def database(self) -> Path:
        """The tracker's database, read without asking the tracker."""
        return self.machines["services"].disk / "home" / "mlflow.db"

    def env(self) -> dict[str, str]:
        """Return the environment of a program on any machine."""
        here = self.network.here
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        return kept | {
            "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)]),
            "HOME": str(here / "home"),
            "DAB_HOME": str(here / "home"),
            "TMPDIR": str(here / "tmp"),
            "OMP_NUM_THREADS": "1",
            "AWS_ACCESS_KEY_ID": s3_server.KEY_ID,
            "AWS_SECRET_ACCESS_KEY": s3_server.SECRET,
            "AWS_ENDPOINT_URL": f"http://{self.machines['services'].address}:{_STORE_PORT}",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # by default workers step back behind whatever else runs on the machine
            "RAY_memory_monitor_refresh_ms": "0",  # all machines of the lab show the memory of the one below
        }

    def start_head(self, name: str = "head") -> None:
        """Start Ray on the head."""
        machine = self.machines[name]
        self._start_ray(
            machine, "--head", f"--port={_CONTROL_PORT}", "--num-cpus=0", f"--temp-dir={self.network.here / 'ray'}",
            f"--dashboard-host={machine.address}", f"--dashboard-port={DASHBOARD_PORT}", "--include-dashboard=true",
        )  # fmt: skip

    def start_node(self, name: str) -> None:
        """Start Ray on a node."""
        head = self.machines["head"].address
        self._start_ray(self.machines[name], f"--address={head}:{_CONTROL_PORT}", f"--num-cpus={self.node_cpus}")

    def _start_ray(self, machine: Machine, *options: str) -> None:
        command = [
            str(BIN / "ray"), "start", "--block", f"--node-ip-address={machine.address}", "--num-gpus=0",
            "--object-store-memory=100000000", "--disable-usage-stats", "--log-style=record", *options,
        ]  # fmt: skip
        self._start(f"ray on {machine.name}", machine, command)

    def start_tracker(self) -> None:
        """Start the MLflow server; what it has recorded before is there."""
        here = self.network.here / "home"
        machine = self.machines["services"]
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", machine.address, "--port", str(_TRACKER_PORT),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{here / 'mlflow.db'}",
            "--artifacts-destination", str(here / "artifacts"),
        ]  # fmt: skip
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._start("tracker", machine, command, settings)

    def start_store(self) -> None:
        """Start the object store; what it was given before is there."""
        machine = self.machines["services"]
        settings = {"root": str(self.network.here / "s3"), "host": machine.address, "port": _STORE_PORT}
        self._start("store", machine, [sys.executable, s3_server.__file__, json.dumps(settings)])

    def stop_store(self) -> None:
        """Kill the object store."""
        for process in self.find("s3_server", "services"):
            kill(process)

    @property
    def bucket(self) -> Path:
        """The folder that holds what the object store was given."""
        return self.machines["services"].disk / "s3" / "objects" / str(s3_server.BUCKET)

    def add_node(self, name: str) -> None:
        """Start Ray on one more machine."""
        self._nodes.append(name)
        self.start_node(name)

    def remove_node(self, name: str) -> None:
        """Take a machine away for good: its power first."""
        if name in self._nodes:
            self._nodes.remove(name)
            self.machines[name].power_off()

    def stop_tracker(self) -> None:
        """Kill the MLflow server."""
        for process in self.find("mlflow", "services") + self.find("uvicorn", "services"):
            kill(process)
        self._started["tracker"].wait(30)

    def _start(
        self, what: str, machine: Machine, command: Sequence[str], more_env: Mapping[str, str] | None = None
    ) -> None:
        log = self.network.base / f"{what.replace(' ', '-')}.log"
        self._started[what] = machine.start(command, env={**self.env(), **(more_env or {})}, log=log)

    def tracker_away(self, duration_s: float) -> None:
        """Kill the MLflow server and start it again after a while."""
        self.stop_tracker()
        time.sleep(duration_s)
        self.start_tracker()
        wait_until(self.is_tracker_up, _READY_S, 1.0, what="the tracker is up again")

    def mend(self) -> None:
        """Bring back what faults took away: power, links, Ray on head and nodes, the tracker."""
        for machine in self.machines.values():
            if not machine.is_on:
                machine.power_on()
            machine.plug_in()
        wait_until(self._is_whole, _READY_S, 1.0, what="the lab is whole")

    def _is_whole(self) -> bool:
        """Start Ray and the tracker where they have ended, and return whether all of them are up.

        That is what a supervisor of containers does. A node that was declared dead ends itself.
        """
        for name, start in (("head", self.start_head), *((name, self.start_node) for name in self._nodes)):
            if self._started[f"ray on {name}"].poll() is not None:
                start(name)
        if self._started["tracker"].poll() is not None:
            self.start_tracker()
        return self.living_nodes() == {"head", *self._nodes} and self.is_tracker_up()

    def name_cluster(self) -> None:
        """Give the cluster the name `lab` on the desk, as whoever works with it would."""
        done = self.dab(
            "cluster", "add", "lab", "--address", self.jobs_url, "--token-file", self.token, "--tracking",
            self.tracking_uri, "--storage", self.shared / "runs", "--replace",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def ask(self, path: str) -> Any:
        """Return the JSON answer of the dashboard's HTTP interface, or None while it does not answer."""
        return self._ask(f"{self.jobs_url}{path}")

    def _ask(self, url: str) -> Any:
        command = [sys.executable, "-S", "-c", _ASK, url, str(self.token)]
        try:
            return json.loads(self.machines["desk"].run(command, env=self.env()))
        except (AssertionError, ValueError):
            return None

    def is_tracker_up(self) -> bool:
        """Whether the MLflow server answers."""
        command = [sys.executable, "-S", "-c", _ASK, f"{self.tracking_uri}/health", str(self.token)]
        try:
            return self.machines["desk"].run(command) == "OK"
        except AssertionError:
            return False

    def living_nodes(self) -> set[str]:
        """Return the names of the machines that Ray counts as nodes."""
        answer = self.ask("/api/v0/nodes") or {}
        nodes = answer.get("data", {}).get("result", {}).get("result", []) if answer.get("result") else []
        names = {machine.address: name for name, machine in self.machines.items()}
        return {names[node["node_ip"]] for node in nodes if node["state"] == "ALIVE"}

    def placement_groups(self) -> list[dict[str, Any]]:
        """Return the placement groups that hold or wait for resources."""
        answer = self.ask("/api/v0/placement_groups") or {}
        found = answer.get("data", {}).get("result", {}).get("result", [])
        return [group for group in found if group["state"] != "REMOVED"]

    def find(self, title: str, *names: str) -> list[psutil.Process]:
        """Return the processes whose command line holds `title`, on the named machines or on all."""
        found = []
        for name in names or self.machines:
            for process in self.machines[name].processes():
                try:
                    if title in " ".join(process.cmdline()):
                        found.append(process)
                except psutil.Error:
                    continue
        return found

    def raylet(self, name: str) -> psutil.Process:
        """Return the process that makes a machine a node."""
        (found,) = [each for each in self.find("raylet/raylet", name) if each.name() == "raylet"]
        return found

    def dab(self, *arguments: object, timeout_s: float = 240) -> "subprocess.CompletedProcess[str]":
        """Run a `dab` command on the desk, with `--json`, to its end."""
        started = self.start_dab(*arguments)
        stdout, stderr = started.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(started.args, started.returncode, stdout, stderr)

    def start_dab(self, *arguments: object) -> "subprocess.Popen[str]":
        """Start a `dab` command on the desk, with `--json`."""
        return self.machines["desk"].start([str(PROGRAM), *map(str, arguments), "--json"], env=self.env())


def kill(process: psutil.Process) -> None:
    """End a process without a chance to clean up, and wait until it is gone."""
    try:
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: not is_alive(process), 30, 0.01, what=f"{process} is gone")
    except psutil.NoSuchProcess:
        return


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs, a zombie not counted."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
