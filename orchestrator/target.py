"""Which cluster a run is sent to: the embedded one, one with a name in `clusters.toml`, or the URL of a Jobs API.

Leaves out how it is spoken to (`orchestrator.jobs_api`) and what is checked before a run is sent
(`orchestrator.reach`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dabnn.data.remote import shown
from dabnn.errors import InvalidInputError
from orchestrator.cluster import Cluster, ensure_cluster, find_cluster
from orchestrator.clusters_file import EMBEDDED, FILE, Entry, known_clusters
from orchestrator.home import home_path
from orchestrator.names import nearest

_DEFAULT_TOKEN = "~/.ray/auth_token"  # noqa: S105 - a file
_OTHERS_MAY_READ = 0o077


@dataclass(frozen=True)
class Token:
    """Where the token of a cluster is read from; the token itself is never kept, shown or sent in a job.

    Attributes:
        file: File that holds it.
        variable: Environment variable that holds it.
    """

    file: Path | None = None
    variable: str | None = None

    def read(self) -> str:
        """Return the token.

        Raises:
            InvalidInputError: The file or variable is missing or empty.
        """
        try:
            text = os.environ[self.variable] if self.variable else Path(str(self.file)).read_text(encoding="ascii")
        except (KeyError, OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not set" if self.variable else "not a token"
            raise InvalidInputError(f"token: {self} cannot be read ({reason}). {_HOW}") from error
        if not text.strip() or len(text.split()) > 1:
            raise InvalidInputError(f"token: {self} holds no token. {_HOW}")
        return text.strip()

    def is_exposed(self) -> bool:
        """Whether other users of this machine may read the file, and this user could forbid it."""
        if self.file is None or not self.file.exists():
            return False
        found = self.file.stat()
        return bool(found.st_mode & _OTHERS_MAY_READ) and found.st_uid == os.getuid()

    def __str__(self) -> str:
        return f"the environment variable {self.variable}" if self.variable else str(self.file)


_HOW = (
    "The token is that of the cluster: copy the file ~/.ray/auth_token of its head (chmod 600), and name it with "
    f"`dab cluster add NAME --address URL --token-file FILE` or as token_file in {FILE}."
)


@dataclass(frozen=True)
class Target:
    """A cluster that a run is sent to.

    Attributes:
        name: "embedded", a name of `clusters.toml`, or host:port.
        jobs_url: URL of the Jobs API; empty while the embedded cluster does not run.
        token: Where its token is; None: it has none that is known here.
        address: ip:port of the control service for programs on this machine; None for all but the embedded cluster.
        tracking_uri: Default MLflow server of runs sent there.
        storage: Default place of their folders.
        verify: Certificates to trust: a file, or True for the system's.
        max_running: Runs of one user at a time.
        python: Interpreter of its jobs.
        is_open: Whether it may take commands without a token.
    """

    name: str
    jobs_url: str
    token: Token | None
    address: str | None = None
    tracking_uri: str | None = None
    storage: str | None = None
    verify: str | bool = True
    max_running: int | None = None
    python: str | None = None
    is_open: bool = field(default=False)

    @property
    def is_embedded(self) -> bool:
        """Whether it is the cluster of this machine."""
        return self.name == EMBEDDED

    @property
    def is_unencrypted(self) -> bool:
        """Whether what is sent there, the token too, can be read on the way."""
        host = urlsplit(self.jobs_url).hostname or ""
        return self.jobs_url.startswith("http://") and host != "localhost" and not host.startswith("127.")

    def __str__(self) -> str:
        return "the Ray cluster" if self.is_embedded else f"the cluster {self.name}"


def resolve_target(address: str | None) -> Target:
    """Return the cluster that `address` means; nothing is started or asked.

    Args:
        address: URL, name of `clusters.toml`, or None (or "embedded") for the cluster of this machine.

    Raises:
        InvalidInputError: It is no URL of a Jobs API and no known name.
    """
    if address in (None, EMBEDDED):
        cluster = find_cluster()
        return Target(EMBEDDED, "", None) if cluster is None else embedded(cluster)
    known = known_clusters()
    if address in known:
        return named(str(address), known[str(address)])
    if "/" not in str(address) and ":" not in str(address):
        raise _unknown(str(address), known)
    url = jobs_url("--address", str(address))
    for name, entry in known.items():
        if jobs_url(f"{FILE}: [{name}] address", entry.address) == url:
            return named(name, entry)
    return Target(urlsplit(url).netloc, url, default_token())


def ensure_target(target: Target, on_wait: Callable[[str], None] | None = None) -> Target:
    """Return the target, running: the embedded cluster is started where it does not run, others are not."""
    return embedded(ensure_cluster(on_wait=on_wait)) if target.is_embedded else target


def embedded(cluster: Cluster) -> Target:
    """Return the target that the running cluster of this machine is."""
    return Target(EMBEDDED, cluster.dashboard_url, Token(cluster.token_path), address=cluster.address)


def default_token() -> Token | None:
    """Return where Ray's own programs look for a token, in their order; None if there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Token(variable="RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named or _DEFAULT_TOKEN).expanduser()
    return Token(file) if named or file.exists() else None


def jobs_url(where: str, address: str) -> str:
    """Return `address` as the URL of a Jobs API: with a scheme, without a slash at the end.

    Raises:
        InvalidInputError: It cannot be one.
    """
    if "@" in address:
        raise InvalidInputError(f"{where}: holds a password, which would be kept in records. {_HOW}")
    url = address if "://" in address else f"http://{address}"
    wrong = f"{where}: {shown(url)} is no address of a Jobs API"
    example = "such as http://127.0.0.1:8265 or https://ray.lab"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidInputError(f"{wrong}, {example}.") from None
    if parts.scheme not in {"http", "https"}:
        raise InvalidInputError(f"{wrong}; it begins with http:// or https://, {example}.")
    if not parts.hostname or parts.query or parts.fragment or port == 0:
        raise InvalidInputError(f"{wrong}, {example}.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def named(name: str, entry: Entry) -> Target:
    """Return the target that an entry of `clusters.toml` describes.

    Raises:
        InvalidInputError: Its address or storage cannot be one.
    """
    if entry.token_file:
        token: Token | None = Token(_from_home(entry.token_file))
    else:
        token = Token(variable=entry.token_variable) if entry.token_variable else default_token()
    if entry.storage and "://" not in entry.storage and not Path(entry.storage).is_absolute():
        raise InvalidInputError(
            f"{FILE}: [{name}] storage: {entry.storage} is neither an absolute path nor a URL; every node must find it."
        )
    return Target(
        name,
        jobs_url(f"{FILE}: [{name}] address", entry.address),
        token,
        tracking_uri=entry.tracking,
        storage=entry.storage,
        verify=str(_from_home(entry.verify)) if isinstance(entry.verify, str) else True,
        max_running=entry.max_running,
        python=entry.python,
        is_open=entry.open,
    )


def _from_home(path: str) -> Path:
    """Return a path of the file, which is meant from where the file lies."""
    return home_path() / Path(path).expanduser()


def _unknown(name: str, known: dict[str, Entry]) -> InvalidInputError:
    likely = nearest(name, known)
    others = f" Did you mean {likely}? Known: {', '.join(sorted(known))}." if likely else ""
    return InvalidInputError(
        f"--address: {name!r} is neither a URL nor a cluster in {home_path() / FILE}.{others} "
        f"`dab cluster add {name} --address URL` makes it one."
    )
