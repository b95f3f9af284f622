"""Runs on several nodes of a real cluster, all on this machine: 127.0.0.2 drives, the others hold workers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest
from program import ROOT, wait_until

from dabnn.run_folder import RunFolder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent
TOKEN = "t" * 64
CAN_HIDE = os.geteuid() == 0 and shutil.which("unshare") is not None


@dataclass
class Nodes:
    """A cluster, and programs that run on its head."""

    process: "subprocess.Popen[str]"
    address: str
    env: dict[str, str] = field(default_factory=dict)

    def __call__(self, *words: object) -> None:
        """Have the cluster do something; see `nodes_program`."""
        stdin, stdout = pipes(self.process)
        stdin.write(" ".join(map(str, words)) + "\n")
        stdin.flush()
        assert stdout.readline() == "done\n"

    def drive(self, *arguments: object) -> "subprocess.Popen[str]":
        """Start a program on the head; see `nodes_driver`."""
        return start("nodes_driver.py", self.env | {"RAY_ADDRESS": self.address}, *arguments)

    def addresses(self) -> set[str]:
        """Return the addresses of the nodes that are alive."""
        alive = "[node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']]"
        program = f"import ray; ray.init(log_to_driver=False); print(*{alive})"
        done = subprocess.run([sys.executable, "-c", program], env=self.env | {"RAY_ADDRESS": self.address},
                              capture_output=True, text=True, timeout=120, check=True)  # fmt: skip
        return set(done.stdout.split())


def start(program: str, env: dict[str, str], *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(HERE / program), *map(str, arguments)],
        env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr,
    )  # fmt: skip


def pipes(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


@contextmanager
def nodes_of() -> Iterator[Nodes]:
    """Give a cluster with a head; all of it is ended afterwards."""
    foreign = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "DAB_HOME")
    env = {key: value for key, value in os.environ.items() if key not in foreign} | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_DEDUP_LOGS": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    with ExitStack() as stack:
        for _ in range(3):  # Ray gives a node's agents 15 s to start, which a busy machine may take longer for
            process = start("nodes_program.py", env)
            stack.callback(process.communicate)
            address = pipes(process)[1].readline().strip()
            if address:
                break
        yield Nodes(process, address, env)


@pytest.mark.skipif(not CAN_HIDE, reason="a node that sees another disk needs root and unshare")
def test_what_a_node_lacks_is_found_before_training_and_named(digits: Path, tmp_path: Path) -> None:
    """The second node sees other contents in one folder, as if that were not shared."""
    own = tmp_path / "own"
    shutil.copytree(digits, own / "digits")
    good = {"folder": str(tmp_path / "run"), "data": [str(digits)]}
    questions = [
        good,
        good | {"folder": str(own / "run")},
        good | {"data": [str(own / "digits")]},
        good | {"interface": "none0"},
        good | {"num_loaders": 2, "sample_bytes": 10**12},
    ]
    with nodes_of() as nodes:
        nodes("add", "127.0.0.3", 1)
        nodes("hidden", "127.0.0.4", 1, own)
        wait_until(lambda: len(nodes.addresses()) == 3, poll_s=1)
        told, _ = nodes.drive("look").communicate("\n".join(map(json.dumps, questions)) + "\n", timeout=600)
    nothing, storage, data, interface, memory = map(json.loads, told.splitlines())
    assert nothing == []
    (line,) = storage
    assert line.startswith("storage: node 127.0.0.4 cannot use")
    (line,) = data
    assert line.startswith(f"data: node 127.0.0.4 does not see {own / 'digits'}")
    assert sorted(line.partition(" has no")[0] for line in interface) == [
        "cluster.interface: node 127.0.0.3", "cluster.interface: node 127.0.0.4"
    ]  # fmt: skip
    assert all("/dev/shm" in line for line in memory)


@pytest.mark.slow
def test_an_elastic_run_loses_a_node_gets_one_back_and_sees_the_same_samples(digits: Path, tmp_path: Path) -> None:
    overrides = [
        "name=elastic", f"data.train={digits}", "data.batch_size=32", "model.width=0.0625", "train.epochs=200",
        "train.checkpoint.every_steps=10", "cluster.min_workers=1",
    ]  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    with nodes_of() as nodes:
        nodes("add", "127.0.0.3", 1)
        nodes("add", "127.0.0.4", 1)
        run = nodes.drive("train", folder.root, *overrides)
        wait_until(lambda: folder.progress().get("step", 0) > 30, 600)
        nodes("kill", "127.0.0.4")
        wait_until(lambda: len(folder.attempts()) == 2, 600)
        nodes("add", "127.0.0.5", 1)
        wait_until(lambda: len(folder.attempts()) == 3, 600)
        grown = folder.attempts()[2]["start_step"]
        wait_until(lambda: folder.progress().get("step", 0) > grown + 60, 600)
        folder.request_stop()
        told, _ = run.communicate(timeout=600)
        whole = RunFolder(tmp_path / "whole")
        num_epochs = len(folder.metrics())
        alone = ["cluster.num_workers=2", f"train.epochs={num_epochs}"]
        nodes.drive("train", whole.root, *overrides[:4], *alone).communicate(timeout=600)
    assert json.loads(told.splitlines()[-1])["status"] == "stopped"
    assert [attempt["world_size"] for attempt in folder.attempts()] == [2, 1, 2]
    assert [orders(line) for line in folder.metrics()] == [orders(line) for line in whole.metrics()]
    # Nothing was computed twice for the sake of growing: the checkpoint was taken where the loop stood.
    assert folder.attempts()[2]["start_step"] > folder.attempts()[1]["start_step"]


def orders(line: dict[str, Any]) -> tuple[int, float]:
    """Return an epoch and the digest of the samples of its steps."""
    return line["step"], line["metrics"]["sample_order"]
