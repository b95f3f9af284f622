"""A folder behind a URL: list, read, write and remove files. `s3://bucket/folder`, or what else fsspec knows.

A file appears whole or not at all. What waiting may mend (no connection, a timeout, 5xx) is a `StoreAwayError`; a store
that refuses or is full is a `StoreError`, told at once. Credentials are those of the environment of this process.
Leaves out http, which takes no files, and what a run keeps where: see `dabnn.run_mirror`.
"""

import errno
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from dabnn.data.remote import shown
from dabnn.errors import DabError, InvalidInputError

_T = TypeVar("_T")
# Where a name with slashes is only a name, and a file is there once all of it was sent.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"})
# Without these a server of fsspec's would be found, but nothing of it lasts, or nothing can be written.
_REFUSED = {
    "http": "takes no files",
    "https": "takes no files",
    "memory": "is the memory of one process",
}
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 5, 60
_TIMES = ("mtime", "LastModified", "updated", "created")  # as fsspec's packages name it
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_FULL_CODES = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "StorageFull", "507"})
_REFUSAL_CODES = frozenset({"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})
_REFUSALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"})
_ADVICE = (
    "Check AWS_ACCESS_KEY_ID or AWS_PROFILE, and AWS_ENDPOINT_URL, in the environment of this process (that of `dab "
    "cluster up` or of the node), and that they may list, read, write and delete there"
)

_filesystems: dict[tuple[Any, ...], Any] = {}
_filesystems_lock = threading.Lock()


class StoreAwayError(Exception):
    """The store does not answer, or with an error that may be over in a while."""


class StoreError(DabError):
    """The store refuses, is full, or has no such bucket; waiting does not mend it."""


@dataclass(frozen=True)
class Entry:
    """What a store says of a file.

    Attributes:
        num_bytes: Its size.
        mark: Changes when the file does.
        time: When it was written, in seconds since 1970; None where the store does not say.
    """

    num_bytes: int
    mark: str
    time: float | None = field(default=None, compare=False)


def check_url(url: str) -> None:
    """Refuse a URL that no run can be kept behind.

    Raises:
        InvalidInputError: It holds a password, names no bucket, or is of a kind that takes no files or is not known.
    """
    parts = urlsplit(url)
    if parts.scheme in _REFUSED:
        raise InvalidInputError(
            f"storage: {shown(url)}: {parts.scheme}:// {_REFUSED[parts.scheme]}. Name a folder that every node sees, "
            "or s3://BUCKET/FOLDER."
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidInputError(
            f"storage: {shown(url)}: holds a user name, a password or something after the path, which would end up in "
            "logs and records. Stores take credentials from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE)."
        )
    if not parts.netloc or any(character.isspace() or not character.isprintable() for character in url):
        raise InvalidInputError(
            f"storage: {shown(url)!r}: names no bucket, or holds a space or control character. Write "
            "s3://BUCKET/FOLDER."
        )
    _filesystem_class(parts.scheme)


def check_access(url: str, limit_s: float = 10.0) -> None:
    """Write, read and remove a small file, so that a store that will not take a run is found before there is one.

    Raises:
        InvalidInputError: As `check_url` says.
        StoreError: The store refuses, is full, or does not answer for `limit_s`.
    """
    store, name, text = RunStore(url), f".probe-{uuid.uuid4().hex}", b"dab"
    patiently(lambda: store.write(name, text), str(store), limit_s)
    found = patiently(lambda: store.read(name), str(store), limit_s)
    patiently(lambda: store.remove(name), str(store), limit_s)
    if found != text:
        raise StoreError(f"storage: {store}: what was written cannot be read back. Is that the server of this bucket?")


class RunStore:
    """A folder behind a URL; making one asks nothing of the server.

    Raises:
        InvalidInputError: As `check_url` says.
    """

    def __init__(self, url: str) -> None:
        check_url(url)
        self.url = url.rstrip("/")
        self._scheme = urlsplit(url).scheme

    def __str__(self) -> str:
        return shown(self.url)

    def child(self, name: str) -> str:
        """Return the URL of a file in it."""
        return f"{self.url}/{name}"

    def entries(self, folder: str = "") -> dict[str, Entry]:
        """Return the files that lie in a folder of it directly, by name; none where there is no such folder.

        Raises:
            StoreAwayError: It does not answer.
            StoreError: It refuses, or there is no such bucket.
        """
        return {
            _last(entry): Entry(int(entry["size"] or 0), _mark(entry), _time(entry))
            for entry in self._list(folder)
            if entry["type"] == "file"
        }

    def folders(self, folder: str = "") -> list[str]:
        """Return the names of the folders that lie in a folder of it; see `entries` for what is raised."""
        return sorted(_last(entry) for entry in self._list(folder) if entry["type"] == "directory")

    def read(self, name: str) -> bytes | None:
        """Return a file, or None where there is none; see `entries` for what is raised."""
        found: bytes | None = self._ask(lambda files: files.cat_file(self.child(name)), None)
        return found

    def fetch(self, name: str, path: Path) -> str | None:
        """Copy a file to `path` in one step.

        Returns:
            Its sha256 as hexadecimal digits; None where there is no such file.

        Raises:
            StoreAwayError: The store does not answer.
            StoreError: It refuses.
            OSError: `path` cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            part.touch()  # what cannot be written here is no failure of the store
            if not self._ask(lambda files: files.get_file(self.child(name), str(part)) or True, False, is_local=True):
                return None
            with part.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return digest

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file; see `send`."""
        self._put(name, lambda files, place: files.pipe_file(place, data))

    def send(self, path: Path, name: str) -> None:
        """Copy a file of this machine into the store; who reads it there sees the old one or the whole new one.

        Raises:
            FileNotFoundError: `path` is gone.
            StoreAwayError: The store does not answer.
            StoreError: It refuses, or is full.
        """
        if not path.exists():
            raise FileNotFoundError(str(path))
        try:
            self._put(name, lambda files, place: files.put_file(str(path), place))
        except StoreAwayError:
            if path.exists():
                raise
            raise FileNotFoundError(str(path)) from None

    def remove(self, name: str) -> None:
        """Remove a file, if it is there; see `entries` for what is raised."""
        self._ask(lambda files: files.rm_file(self.child(name)), None)

    def remove_all(self) -> None:
        """Remove everything below it; see `entries` for what is raised."""
        self._ask(lambda files: files.rm(self.url, recursive=True), None)

    def num_bytes(self) -> int:
        """Return how many bytes all files below it have; see `entries` for what is raised."""
        return int(self._ask(lambda files: sum(files.du(self.url, total=False).values()), 0))

    def _list(self, folder: str) -> list[dict[str, Any]]:
        place = f"{self.url}/{folder}" if folder else self.url
        found: list[dict[str, Any]] = self._ask(lambda files: files.ls(place, detail=True, refresh=True), [])
        return found

    def _put(self, name: str, put: Callable[[Any, str], object]) -> None:
        place = self.child(name)
        head, _, last = place.rpartition("/")
        is_whole = self._scheme in _OBJECT_STORES

        def act(files: Any) -> bool:
            if is_whole:
                put(files, place)
                return True
            files.makedirs(head, exist_ok=True)
            part = f"{head}/.{last}.{os.getpid()}"
            put(files, part)
            files.mv(part, place)
            return True

        if not self._ask(act, False):
            raise StoreAwayError(f"{name} was not taken: not found")

    def _ask(self, call: Callable[[Any], Any], absent: Any, *, is_local: bool = False) -> Any:
        """Return what `call` returns, or `absent` where there is no such file.

        Args:
            call: Is given fsspec's access to the store.
            absent: Returned where there is no such file.
            is_local: Whether a full disk is that of this machine.
        """
        try:
            return call(self._files())
        except Exception as error:  # of packages not imported here; what is none of theirs is raised again
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in _codes(error):
                return absent
            if is_local and getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._explain(error)

    def _files(self) -> Any:
        return _filesystem(self._scheme)

    def _explain(self, error: Exception) -> NoReturn:
        """Raise what an error of fsspec's packages means."""
        codes, text = _codes(error), _words(error)
        if codes & _FULL_CODES or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"storage: no room in {self} ({text}). What is there is intact: free some space or raise the quota, "
                "then `dab resume` the run."
            ) from error
        if "NoSuchBucket" in codes:
            raise StoreError(f"storage: {self}: there is no such bucket. Create it, or name another.") from error
        if codes & (_REFUSAL_CODES | _REFUSALS) or isinstance(error, PermissionError):
            raise StoreError(f"storage: {self}: the store refuses ({text}). {_ADVICE}.") from error
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _PACKAGES:
            raise StoreAwayError(text) from error
        raise error


# Packages below fsspec whose exceptions, where they are none of the above, are those of a connection.
_PACKAGES = frozenset({"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "asyncio"})


def patiently(
    call: Callable[[], _T],
    what: str,
    limit_s: float,
    *,
    on_wait: Callable[[str], None] | None = None,
    give_up: threading.Event | None = None,
) -> _T:
    """Call until the store answers.

    Args:
        call: Raises `StoreAwayError` where it may be called again.
        what: The store, as a message may show it.
        limit_s: How long to go on.
        on_wait: Told before each wait why it waits.
        give_up: Ends the waiting when set.

    Raises:
        StoreError: It did not answer for so long.
    """
    began, pause_s = time.monotonic(), _FIRST_PAUSE_S
    stop = give_up or threading.Event()
    while True:
        try:
            return call()
        except StoreAwayError as error:
            waited = time.monotonic() - began
            if waited >= limit_s or stop.is_set():
                raise StoreError(
                    f"storage: {what} does not answer ({error}); given up after {waited:.0f} s. Check the store, "
                    "AWS_ENDPOINT_URL and the network."
                ) from error
            if on_wait is not None:
                on_wait(f"waiting for {what} ({error})")
            stop.wait(min(pause_s, max(limit_s - waited, 0.01)))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _filesystem(scheme: str) -> Any:
    """Return fsspec's access to stores of a kind, one for each process and set of credentials."""
    key = (os.getpid(), scheme, *(item for item in sorted(os.environ.items()) if item[0].startswith("AWS_")))
    with _filesystems_lock:
        if key not in _filesystems:
            settings: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
            if scheme in ("s3", "s3a"):
                settings["config_kwargs"] = {
                    "connect_timeout": _CONNECT_TIMEOUT_S,
                    "read_timeout": _READ_TIMEOUT_S,
                    "retries": {"max_attempts": 1},
                    "signature_version": "s3v4",
                    # Checksums in trailers, newer than most servers that speak S3, are no more than TCP and ours do.
                    "request_checksum_calculation": "when_required",
                    "response_checksum_validation": "when_required",
                }
            _filesystems[key] = _filesystem_class(scheme)(**settings)
        return _filesystems[key]


def _filesystem_class(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        raise InvalidInputError(
            f"storage: {scheme}:// cannot be used here ({error}). Install that package on every node, or name a folder "
            "or s3://BUCKET/FOLDER."
        ) from None


def _last(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _time(entry: dict[str, Any]) -> float | None:
    for key in _TIMES:
        value = entry.get(key)
        with suppress(ValueError):
            value = datetime.fromisoformat(value) if isinstance(value, str) else value
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


def _mark(entry: dict[str, Any]) -> str:
    for key in ("ETag", "etag", *_TIMES):
        if entry.get(key):
            return f"{entry['size']} {entry[key]}"
    return str(entry["size"])


def _codes(error: BaseException | None) -> set[str]:
    """Return the words that the packages below have for what is wrong: class names, S3's codes, status numbers."""
    found: set[str] = set()
    while error is not None:
        found.add(type(error).__name__)
        with suppress(AttributeError, TypeError):
            response = error.response  # type: ignore[attr-defined]
            found.add(str(response["Error"].get("Code")))
            found.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode")))
        error = error.__cause__
    return found


def _words(error: BaseException) -> str:
    """Return what is wrong on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error.__cause__, Exception) and (code := getattr(error.__cause__, "response", None)):
        text = f"{code.get('Error', {}).get('Code', '')}: {text}".removeprefix(": ")
    return text[:300]
