"""A Ray cluster of several nodes on this machine, in a process of its own: 127.0.0.2 is the head and holds no worker.

Reads commands from its standard input, one a line, and answers each with a line: `add IP CPUS` starts a node, `kill IP`
ends one as a loss of power would, `hidden IP CPUS FOLDER` starts one that sees an empty folder in the place of FOLDER.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAD = "127.0.0.2"


def main() -> None:
    """Start the head and obey until the input ends."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        os.environ["RAY_TMPDIR"] = folder
        head = {"num_cpus": 0, "node_ip_address": HEAD, "include_dashboard": True, "dashboard_host": "127.0.0.1"}
        cluster = Cluster(initialize_head=True, head_node_args={**head, "dashboard_port": free_port(), **settings()})
        nodes: dict[str, Any] = {}
        own: list[subprocess.Popen[bytes]] = []
        answer(cluster.address)
        try:
            for line in sys.stdin:
                command, ip, *rest = line.split()
                if command == "add":
                    nodes[ip] = patiently(lambda ip=ip, cpus=rest[0]: add(cluster, ip, cpus))
                elif command == "kill":
                    cluster.remove_node(nodes.pop(ip), allow_graceful=False)
                else:
                    own.append(hidden(cluster.address, ip, rest[0], Path(rest[1])))
                answer("done")
        finally:
            for process in own:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            cluster.shutdown()


def add(cluster: Any, ip: str, cpus: str) -> Any:
    """Start a node."""
    return cluster.add_node(num_cpus=int(cpus), node_ip_address=ip, **settings())


def patiently(call: Callable[[], Any], times: int = 3) -> Any:
    """Call again what failed: Ray gives a node's agents 15 s to start, which a busy machine may take longer for."""
    for _ in range(times - 1):
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - Ray raises just that
            print(error, file=sys.stderr)
    return call()


def settings() -> dict[str, int]:
    """Return what all nodes share: with ports that are told, Ray does not give up on a slow machine's agents."""
    return {
        "object_store_memory": 100_000_000,
        "metrics_agent_port": free_port(),
        "dashboard_agent_listen_port": free_port(),
        "runtime_env_agent_port": free_port(),
        "metrics_export_port": free_port(),
    }


def hidden(address: str, ip: str, cpus: str, folder: Path) -> "subprocess.Popen[bytes]":
    """Start a node in a mount namespace of its own, where `folder` is empty."""
    ray = Path(sys.executable).with_name("ray")
    ports = " ".join(
        f"--{name}={free_port()}"
        for name in (
            "dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port", "metrics-export-port"
        )
    )  # fmt: skip
    start = f"{ray} start --address={address} --node-ip-address={ip} --num-cpus={cpus} --block {ports}"
    return subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {folder} && ({start} || {start} || {start})"],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answer(line: str) -> None:
    """Print a line for who sent the command."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
