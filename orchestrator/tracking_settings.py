"""`DAB_HOME/tracking.toml`: how this machine's MLflow server runs where the defaults do not do.

    host = "0.0.0.0"                          # IPv4 address to listen on, here all; default "127.0.0.1"
    port = 5000                               # default: a free one
    allowed_hosts = ["mlflow.lab"]            # names by which other machines reach it; requests to others are refused
    password = true                           # ask for a password on loopback, too
    store = "postgresql://dab@db.lab/mlflow"  # database of runs; default: sqlite in DAB_HOME
    artifacts = "s3://bucket/artifacts"       # where the server keeps files; default: DAB_HOME/artifacts

Beyond loopback the server asks for a password (`orchestrator.tracking_password`). The file holds no secrets: the
password of a database stands in `~/.pgpass`, that of an object store in the environment or in `~/.aws/credentials`.
"""

import ipaddress
import tomllib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from dabnn.data.remote import shown
from dabnn.errors import InvalidInputError
from orchestrator.home import home_path
from orchestrator.names import nearest

FILE = "tracking.toml"
_LOOPBACK = "127.0.0.1"
_ALL = "0.0.0.0"  # noqa: S104 - what a user may choose, with a password
_KINDS = {"host": str, "port": int, "allowed_hosts": list, "password": bool, "store": str, "artifacts": str}
_WORDS: dict[type, str] = {str: "text", int: "a number", bool: "true or false", list: "a list of names"}


@dataclass(frozen=True)
class TrackingSettings:
    """What the file says.

    Attributes:
        host: IPv4 address to listen on.
        port: Port to listen on; None for a free one.
        allowed_hosts: Names by which other machines reach the server.
        password: Whether it asks for a password on loopback, too.
        store: Database of runs; None for sqlite in DAB_HOME.
        artifacts: Where the server keeps files; None for a folder of DAB_HOME.
    """

    host: str = _LOOPBACK
    port: int | None = None
    allowed_hosts: tuple[str, ...] = ()
    password: bool = False
    store: str | None = None
    artifacts: str | None = None

    @property
    def is_exposed(self) -> bool:
        """Whether other machines reach the server, so that it asks for a password."""
        return not ipaddress.IPv4Address(self.host).is_loopback

    @property
    def asks_for_password(self) -> bool:
        """Whether the server lets in only who has the password."""
        return self.is_exposed or self.password

    @property
    def local_host(self) -> str:
        """Address by which programs of this machine reach it."""
        return _LOOPBACK if self.host == _ALL else self.host

    @property
    def store_uri(self) -> str | None:
        """Database of runs with its driver, psycopg2; None for sqlite in DAB_HOME."""
        return self.store and self.store.replace("postgresql://", "postgresql+psycopg2://", 1)

    def host_headers(self, port: int) -> str:
        """Return the hosts that requests may be addressed to, as `mlflow server --allowed-hosts` takes them."""
        names = dict.fromkeys(["localhost", _LOOPBACK, self.local_host, *self.allowed_hosts])
        return ",".join(header for name in names for header in (name, f"{name}:{port}"))


def tracking_settings() -> TrackingSettings:
    """Return what `tracking.toml` says, or the defaults where there is no such file.

    Raises:
        InvalidInputError: The file is no TOML, has an unknown key, a value of the wrong kind, or holds a password.
    """
    file = home_path() / FILE
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return TrackingSettings()
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{file}: cannot be read ({error}). docs/tracking.md shows its form.") from error
    for key, value in table.items():
        kind = _KINDS.get(key)
        if kind is None:
            raise InvalidInputError(f"{file}: {key} is unknown; the nearest known key is {nearest(key, _KINDS)}.")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int) or value in ("", []):
            raise InvalidInputError(f"{file}: {key}: {value!r} is not {_WORDS[kind]}.")
    settings = TrackingSettings(**table | {"allowed_hosts": tuple(map(str, table.get("allowed_hosts", ())))})
    _check(file, settings)
    return settings


def _check(file: Path, settings: TrackingSettings) -> None:
    try:
        ipaddress.IPv4Address(settings.host)
    except ValueError:
        raise InvalidInputError(
            f"{file}: host: {settings.host!r} is no IPv4 address; use one of this machine, or {_ALL} for all of them."
        ) from None
    if settings.is_exposed and not settings.allowed_hosts:
        raise InvalidInputError(
            f"{file}: allowed_hosts: missing, but host is {settings.host}, which other machines reach. List the names "
            "or addresses by which they do; the server refuses requests to others, which keeps web pages from using it."
        )
    if any("*" in name or "," in name for name in settings.allowed_hosts):
        raise InvalidInputError(f"{file}: allowed_hosts: a pattern would let other names in; list each name.")
    if settings.artifacts is not None and shown(settings.artifacts) != settings.artifacts:
        raise InvalidInputError(
            f"{file}: artifacts: {shown(settings.artifacts)} holds a user name, a password or something after the "
            "path, which the list of processes would show. Stores take credentials from the environment or from "
            "~/.aws/credentials."
        )
    if settings.store is not None:
        _check_store(file, settings.store)


def _check_store(file: Path, store: str) -> None:
    parts = urlsplit(store)
    if parts.scheme not in ("postgresql", "postgresql+psycopg2"):
        raise InvalidInputError(
            f"{file}: store: {shown(store)} is not postgresql://USER@HOST/DATABASE; leave it out for sqlite in "
            "DAB_HOME."
        )
    if parts.password is not None or "password" in parse_qs(parts.query):
        raise InvalidInputError(
            f"{file}: store: holds a password, which the list of processes would show. Write "
            "HOST:PORT:DATABASE:USER:PASSWORD into ~/.pgpass (chmod 600), and leave it out here."
        )
