"""A PostgreSQL server of its own: Debian's, as an ordinary process that is not root's, in a private folder."""

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.processes import free_ports

_NOBODY = 65534


@dataclass(frozen=True)
class Database:
    """A database that asks for a password.

    Attributes:
        url: What `store` of tracking.toml takes.
        password: Its password.
        passfile: File in the form of ~/.pgpass that holds it.
    """

    url: str
    password: str
    passfile: Path


def programs() -> Path:
    """Return the folder of PostgreSQL's programs, which Debian keeps off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        raise FileNotFoundError("PostgreSQL is not installed; `apt-get install postgresql` installs it")
    return found[-1].parent if found else Path(str(on_path)).parent


@contextmanager
def postgres() -> Iterator[Database]:
    """A server with an empty database within the block."""
    with tempfile.TemporaryDirectory(prefix="dab-pg-") as folder:
        root, (port,), password = Path(folder), free_ports(1), secrets.token_hex(16)
        data = root / "data"
        data.mkdir()
        (root / "password").write_text(password)
        user = _NOBODY if os.geteuid() == 0 else os.geteuid()
        for path in (root, data, root / "password"):
            os.chown(path, user, -1)
        options = {"cwd": root, "user": user, "stdout": subprocess.DEVNULL}
        made = ["--username=dab", "--pwfile=password", "--auth=scram-sha-256", "--no-sync", "--encoding=UTF8"]
        subprocess.run([programs() / "initdb", "--pgdata=data", *made], check=True, **options)
        settings = ["listen_addresses=127.0.0.1", f"port={port}", f"unix_socket_directories={root}", "fsync=off"]
        command = [programs() / "postgres", "-D", "data", *(part for each in settings for part in ("-c", each))]
        with (root / "log").open("w") as log:
            server = subprocess.Popen(command, **options, stderr=log)
        passfile = root / "pgpass"
        passfile.touch(mode=0o600)
        passfile.write_text(f"127.0.0.1:{port}:*:dab:{password}\n")
        try:
            _create_database(port, passfile, server)
            yield Database(f"postgresql://dab@127.0.0.1:{port}/mlflow", password, passfile)
        finally:
            server.terminate()
            server.wait(timeout=60)


def _create_database(port: int, passfile: Path, server: "subprocess.Popen[bytes]") -> None:
    command = [
        programs() / "createdb",
        "--host=127.0.0.1",
        f"--port={port}",
        "--username=dab",
        "--no-password",
        "mlflow",
    ]
    deadline = time.monotonic() + 60
    while subprocess.run(command, env=os.environ | {"PGPASSFILE": str(passfile)}, capture_output=True).returncode:
        assert server.poll() is None, "PostgreSQL ended"
        assert time.monotonic() < deadline, "PostgreSQL does not answer"
        time.sleep(0.3)
