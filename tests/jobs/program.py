"""Shared by the tests of jobs: the program as a person starts it, and the processes of its runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dabnn.checkpoints import list_checkpoints
from dabnn.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("dab")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def data(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.stdout)

    @property
    def message(self) -> str:
        """What a failed command says."""
        return str(self.data["error"]["message"])


@dataclass(frozen=True)
class Dab:
    """The program `dab` with its own DAB_HOME, started in a folder of its own."""

    home: Path
    cwd: Path

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"DAB_HOME": str(self.home), "OMP_NUM_THREADS": "1"} | self.secrets

    @property
    def secrets(self) -> dict[str, str]:
        """Variables of the environment that the program is started with, whose values must not be kept anywhere."""
        names = ("HF_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
        return {name: f"secret-of-tests-{number}" for number, name in enumerate(names)}

    def __call__(self, *arguments: object, timeout_s: float = 240) -> Done:
        """Run a command with `--json` to its end."""
        done = subprocess.run(
            self.command(*arguments), cwd=self.cwd, env=self.env, capture_output=True, text=True, timeout=timeout_s
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: object) -> Any:
        """Run a command that must succeed and return its JSON document."""
        done = self(*arguments)
        assert done.code == 0, done.stderr
        return done.data

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        """Start a command in a session of its own."""
        return subprocess.Popen(
            self.command(*arguments), cwd=self.cwd, env=self.env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def command(self, *arguments: object) -> list[str]:
        return [str(PROGRAM), *map(str, arguments), "--json"]

    def folder(self, run_id: str) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(self.home / "storage" / run_id)

    def run_ids(self) -> set[str]:
        """Return the ids of all runs that have a folder."""
        return {path.name for path in (self.home / "storage").glob("*")}


def finish(process: "subprocess.Popen[str]", timeout_s: float = 240) -> Done:
    """Wait for a started command."""
    stdout, stderr = process.communicate(timeout=timeout_s)
    return Done(process.returncode, stdout, stderr)


def wait_until(condition: Callable[[], Any], timeout_s: float = 120, poll_s: float = 0.05) -> Any:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(poll_s)
    return value


def processes_of(run_id: str, title: str) -> list[psutil.Process]:
    """Return the processes of a run whose command line holds `title`."""
    found = []
    for process in psutil.process_iter():
        try:
            if title in " ".join(process.cmdline()) and run_id in process.environ().get("DAB_JOB", ""):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(process: psutil.Process) -> None:
    """End a process without a chance to clean up."""
    process.send_signal(signal.SIGKILL)


def has_checkpoint(folder: RunFolder, step: int) -> bool:
    """Whether a checkpoint at or after `step` is committed."""
    return any(checkpoint.step >= step for checkpoint in list_checkpoints(folder.checkpoints))
