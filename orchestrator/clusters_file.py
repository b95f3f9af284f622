"""`DAB_HOME/clusters.toml`: the clusters elsewhere that have a name on this machine.

    [lab]
    address = "https://head.lab:8265"    # the Jobs API
    token_file = "~/.ray/auth_token"     # or token_variable = "LAB_TOKEN"; neither: where Ray itself looks
    tracking = "https://mlflow.lab"      # default of tracking.uri for runs sent there
    storage = "s3://bucket/dab"          # default of storage
    verify = "ca.pem"                    # authority that signed the certificate; true: those of the system
    max_running = 4                      # runs of one user at a time; more wait, see `orchestrator.queue`
    python = "/opt/dab/bin/python"       # interpreter of jobs; default: `python` on the PATH of the nodes
    open = false                         # true: accept that the cluster takes commands without a token

The file holds no secrets, only where they are; it is written with mode 0600 all the same.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dabnn.data.remote import shown
from dabnn.errors import InvalidInputError
from orchestrator.home import home, home_path, write_private
from orchestrator.names import nearest
from orchestrator.processes import locked

FILE = "clusters.toml"
EMBEDDED = "embedded"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True)
class Entry:
    """What the file says of one cluster; see the module for the meaning of each field.

    Attributes:
        address: URL of the Jobs API.
        token_file: File that holds the token.
        token_variable: Environment variable that holds it.
        tracking: MLflow server of runs sent there.
        storage: Where their folders lie.
        verify: File of certificates to trust, or True for the system's.
        max_running: Runs of one user at a time; None for no limit.
        python: Interpreter that jobs are run with.
        open: Whether the cluster may take commands without a token.
    """

    address: str
    token_file: str | None = None
    token_variable: str | None = None
    tracking: str | None = None
    storage: str | None = None
    verify: str | bool = True
    max_running: int | None = None
    python: str | None = None
    open: bool = False


_PLACES = ("address", "tracking", "storage")
_KINDS: dict[str, tuple[type, ...]] = {
    "address": (str,), "token_file": (str,), "token_variable": (str,), "tracking": (str,), "storage": (str,),
    "verify": (str, bool), "max_running": (int,), "python": (str,), "open": (bool,),
}  # fmt: skip


def known_clusters() -> dict[str, Entry]:
    """Return the clusters of the file by name; none where there is no file.

    Raises:
        InvalidInputError: The file is no TOML, has an unknown key, or a value of the wrong kind.
    """
    file = home_path() / FILE
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # not text, or not TOML
        raise InvalidInputError(
            f"{file}: cannot be read ({error}). `dab cluster add --help` shows its form."
        ) from error
    return {name: _entry(f"{file}: [{name}]", name, table) for name, table in tables.items()}


def add_cluster(name: str, entry: Entry, *, replace: bool = False) -> Path:
    """Write a cluster into the file and return the file; others in it stay, comments do not.

    Raises:
        InvalidInputError: The name is taken (unless `replace`) or cannot be one.
    """
    file = home() / FILE
    checked = _entry(f"{file}: [{name}]", name, _given(entry))
    with locked(home() / "clusters.lock", None):
        known = known_clusters()
        if name in known and known[name] != entry and not replace:
            raise InvalidInputError(f"{name}: is {known[name].address} already. Use another name, or --replace.")
        write_private(file, "\n".join(_table(key, each) for key, each in sorted((known | {name: checked}).items())))
    return file


def _given(entry: Entry) -> dict[str, Any]:
    """Return the fields that differ from their default."""
    return {
        each.name: value for each in fields(Entry) if (value := getattr(entry, each.name)) is not each.default
    }  # fmt: skip


def _table(name: str, entry: Entry) -> str:
    # JSON's strings, numbers and truth values are TOML's, too.
    return "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in _given(entry).items()), ""])


def _entry(where: str, name: str, table: object) -> Entry:
    if name == EMBEDDED or not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"{where}: {name!r} cannot name a cluster; use letters, digits, - and _, and not {EMBEDDED!r}, which is "
            "that of this machine."
        )
    if not isinstance(table, Mapping) or "address" not in table:
        raise InvalidInputError(f'{where}: needs address = "http://HOST:PORT", the URL of the Jobs API.')
    for key, value in table.items():
        _check(f"{where} {key}", key, value)
    return Entry(**table)


def _check(where: str, key: str, value: object) -> None:
    if key == "token":
        raise InvalidInputError(
            f'{where}: a token does not belong here. Put it into a file of its own (chmod 600), token_file = "FILE".'
        )
    kinds = _KINDS.get(key)
    if kinds is None:
        raise InvalidInputError(f"{where}: is unknown; the nearest known key is {nearest(key, _KINDS)}.")
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) or value == "":
        wanted = " or ".join({str: "text", bool: "true or false", int: "a number"}[kind] for kind in kinds)
        raise InvalidInputError(f"{where}: {value!r} is not {wanted}.")
    if key in _PLACES and isinstance(value, str) and (shown(value) != value or (key == "address" and "@" in value)):
        raise InvalidInputError(
            f"{where}: holds a user name, a password or something after the path, which would be kept in records and "
            "shown. Leave it out: credentials come from the environment of whoever needs them (SECURITY.md)."
        )
    if key == "verify" and value is False:
        raise InvalidInputError(
            f"{where}: false would let anyone on the way read the token. Name the file of the authority that signed "
            "the "
            'certificate: verify = "ca.pem".'
        )
    if key == "max_running" and isinstance(value, int) and value < 1:
        raise InvalidInputError(
            f"{where}: {value} is less than 1, and no run would ever start. Leave it out for no limit."
        )
