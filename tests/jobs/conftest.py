"""A real cluster and a real tracker in a folder of their own."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from program import Dab
from s3_server import S3Server


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server whose credentials the cluster and every command find in their environment."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def dab(tmp_path_factory: pytest.TempPathFactory, store: S3Server) -> Iterator[Dab]:
    """The program with a cluster and a tracker that run; its folder has a short path, for Ray's sockets."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dab-")))
        program = Dab(home, tmp_path_factory.mktemp("cwd"))
        stack.callback(program, "cluster", "down")
        program.ok("cluster", "up", "--num-cpus", 4)
        program.ok("ui")
        yield program
