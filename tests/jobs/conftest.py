"""A real cluster and a real tracker in a folder of their own."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from program import Dab


@pytest.fixture(scope="session")
def dab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dab]:
    """The program with a cluster and a tracker that run; its folder has a short path, for Ray's sockets."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dab-")))
        program = Dab(home, tmp_path_factory.mktemp("cwd"))
        stack.callback(program, "cluster", "down")
        program.ok("cluster", "up", "--num-cpus", 4)
        program.ok("ui")
        yield program
