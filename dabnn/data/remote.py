"""Reading files from a server, from any byte on, with patience.

Everything is a GET with a range: an `s3://` URL is signed (fsspec, s3fs) and then read as the https URL that comes out.
What waiting may mend (no connection, a timeout, 5xx, too many requests) is tried again; anything else is told at once.
"""

import hashlib
import http.client
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import Any
from urllib.parse import urlsplit

from dabnn.errors import DabError

CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_TELL_EVERY_S = 10.0
_SIGNED_FOR_S = 3600
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# Where credentials come from a server of their own.
_TRANSIENT_SIGNING = frozenset({"CredentialRetrievalError", "MetadataRetrievalError", "ConnectTimeoutError"})
_ADVICE = {
    401: "the server wants credentials; s3:// takes those of the environment (AWS_ACCESS_KEY_ID or AWS_PROFILE)",
    403: "the credentials of this process may not read it, or it does not exist and they may not list; check "
    "AWS_ACCESS_KEY_ID or AWS_PROFILE and AWS_ENDPOINT_URL for s3://, or the server's rules",
    404: "there is no such file; check the URL, and that all shards were uploaded with their index files",
    410: "the file is gone; check the URL",
}

_log = logging.getLogger(__name__)
# Threads wait for one server together: who said why, and when.
_told: dict[str, float] = {}
_signers: dict[tuple[Any, ...], Any] = {}
_signers_lock = threading.Lock()


def is_url(place: str) -> bool:
    """Returns whether a text names a place by URL and not by path."""
    return "://" in place


def shown(place: str) -> str:
    """Returns a path or URL as messages may show it: without password and without what follows the path."""
    if not is_url(place):
        return place
    head, _, rest = place.partition("://")
    rest, mark, _ = rest.partition("?")
    host, slash, path = rest.partition("#")[0].partition("/")
    return f"{head}://{host.rpartition('@')[2]}{slash}{path}{'?***' if mark else ''}"


class NotThereError(DabError):
    """The server says that there is no such file."""


class TransientError(Exception):
    """A failure that may be over in a while."""


class StoppedError(Exception):
    """Whoever wanted the file wants it no more."""


class Patience:
    """Waits between tries, longer each time, until `limit_s` have passed without progress.

    Args:
        what: What is waited for, as a message may show it.
        limit_s: How long to go on without progress.
        stop: Ends a wait when set, with `StoppedError`.
        tell_every_s: How often to say that there is a wait; once in that time for the whole process.
    """

    def __init__(
        self,
        what: str,
        limit_s: float,
        stop: threading.Event | None = None,
        *,
        tell_every_s: float = _TELL_EVERY_S,
    ) -> None:
        self._what = what
        self._limit_s = limit_s
        self._stop = stop or threading.Event()
        self._tell_every_s = tell_every_s
        self._tries = 0
        self._since = time.monotonic()
        self._has_told = False

    def progress(self) -> None:
        """Notes that something was achieved, so that the time without progress begins anew."""
        if self._stop.is_set():
            raise StoppedError
        now = time.monotonic()
        if self._has_told:
            _log.warning("%s: goes on after %.0f s", self._what, now - self._since)
        self._tries, self._has_told = 0, False
        self._since = now

    def pause(self, reason: str, at_most: float = _LONGEST_PAUSE_S) -> None:
        """Waits a while after a failed try.

        Raises:
            DabError: There was no progress for too long.
            StoppedError: `stop` was set.
        """
        now = time.monotonic()
        waited = now - self._since
        if waited >= self._limit_s:
            raise DabError(
                f"{self._what}: {reason}; given up after {waited:.0f} s without progress (data.retry_s is "
                f"{self._limit_s:.0f}). Check the server and the network, then resume the run"
            )
        if waited >= self._tell_every_s and now - _told.get(reason, 0.0) >= self._tell_every_s:
            _told[reason] = now
            self._has_told = True
            _log.warning(
                "waiting for %s: %s; %.0f s without progress, gives up after %.0f",
                self._what,
                reason,
                waited,
                self._limit_s,
            )
        longest = min(_FIRST_PAUSE_S * 2 ** min(self._tries, 16), at_most, max(self._limit_s - waited, 0.01))
        self._tries += 1
        if self._stop.wait(longest * random.uniform(0.5, 1.0)):
            raise StoppedError


@dataclass(frozen=True)
class Body:
    """The rest of a file on its way from a server.

    Attributes:
        start: First byte that comes: 0 where the server does not know ranges.
        num_bytes: Bytes of the whole file; None where the server does not say.
        read: Returns up to so many bytes; none at the end.
    """

    start: int
    num_bytes: int | None
    read: Callable[[int], bytes]


@contextmanager
def open_at(url: str, start: int) -> Iterator[Body]:
    """Asks for a file from a byte on.

    Args:
        url: An http, https or s3 URL.
        start: The first byte wanted.

    Yields:
        What comes.

    Raises:
        NotThereError: There is no such file.
        TransientError: No answer, or one that may be another later.
        DabError: Another refusal.
    """
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(_address(url), headers=headers)  # noqa: S310 (http and https only)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(shown(url), error.code, _error_code(error)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _no_answer(shown(url), error) from None

    def read(num_bytes: int) -> bytes:
        try:
            data: bytes = response.read1(num_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise _no_answer(shown(url), error) from None
        return data

    with response:
        yield Body(*_extent(response, start), read)


def read_bytes(url: str, retry_s: float, stop: threading.Event | None = None) -> bytes:
    """Returns a small file from a server.

    Args:
        url: An http, https or s3 URL.
        retry_s: How long to go on asking without an answer.
        stop: Set when it is wanted no more.

    Raises:
        StoppedError: `stop` was set.
        NotThereError: There is no such file.
        DabError: It cannot be read.
    """
    patience = Patience(shown(url), retry_s, stop)
    while True:
        try:
            with open_at(url, 0) as body:
                data = b"".join(iter(lambda: body.read(CHUNK_BYTES), b""))
            if body.num_bytes in (None, len(data)):
                patience.progress()
                return data
            patience.pause("the connection ended before the file did")
        except TransientError as error:
            patience.pause(str(error))


def download(url: str, file: FileIO, num_bytes: int, patience: Patience) -> str:
    """Fetches what a file does not hold yet.

    Args:
        url: An http, https or s3 URL.
        file: Open for reading and writing; what it holds is taken for the beginning of what is at `url`.
        num_bytes: Bytes of the whole.
        patience: How long to go on without progress.

    Returns:
        The sha256 of the whole as hexadecimal digits.

    Raises:
        NotThereError: There is no such file.
        DabError: It is of another size, or cannot be had.
        OSError: `file` cannot be written.
    """
    if os.fstat(file.fileno()).st_size > num_bytes:
        file.truncate(0)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    done = file.tell()
    while done < num_bytes:
        try:
            with open_at(url, done) as body:
                _require_size(url, body, num_bytes)
                for data in _from(body, done):
                    _write(file, data)
                    digest.update(data)
                    done += len(data)
                    patience.progress()
            if done < num_bytes:
                patience.pause("the connection ended before the file did")
        except TransientError as error:
            patience.pause(str(error))
    return digest.hexdigest()


def _write(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _from(body: Body, start: int) -> Iterator[bytes]:
    """Yields what comes from `start` on; a server without ranges sends what was before, too."""
    position = body.start
    while data := body.read(CHUNK_BYTES):
        position += len(data)
        if position > start:
            new = min(len(data), position - start)
            yield data[len(data) - new :]


def _require_size(url: str, body: Body, num_bytes: int) -> None:
    if body.num_bytes not in (None, num_bytes):
        raise DabError(
            f"{shown(url)}: {body.num_bytes} bytes, the manifest says {num_bytes}, so it was truncated or altered "
            "since the dataset was built; upload the dataset again"
        )


def _extent(response: Any, start: int) -> tuple[int, int | None]:
    """Returns the first byte of an answer, and the bytes of the whole file where they are told."""
    if response.status == 206:
        total = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", "").strip())
        return start, int(total[1]) if total else None
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and length.isdecimal() else None


def _address(url: str) -> str:
    return _signed(url) if url.startswith("s3://") else url


def _signed(url: str) -> str:
    """Returns the https (or endpoint's) URL of an object, signed with the credentials of the environment, if any."""
    key = (os.getpid(), *(item for item in sorted(os.environ.items()) if item[0].startswith("AWS_")))
    try:
        with _signers_lock:
            if key not in _signers:
                _signers[key] = _signer(url)
            signer = _signers[key]
        address: str = signer.sign(url, expiration=_SIGNED_FOR_S)
    except Exception as error:
        # Of botocore, which is not imported here; they say nothing of the credentials themselves.
        if type(error).__name__ in _TRANSIENT_SIGNING:
            raise TransientError(f"no credentials yet ({error})") from error
        raise DabError(
            f"{shown(url)}: cannot be signed: {error}; check AWS_ACCESS_KEY_ID or AWS_PROFILE, and AWS_ENDPOINT_URL, "
            "in the environment of this process"
        ) from error
    return address


def _signer(url: str) -> Any:
    """Returns a file system that signs with the credentials there are, or with none, for a public bucket."""
    import fsspec

    settings: dict[str, Any] = {"config_kwargs": {"signature_version": "s3v4"}, "skip_instance_cache": True}
    signer = fsspec.filesystem("s3", **settings)
    try:
        signer.sign(url)
    except Exception as error:
        if type(error).__name__ != "NoCredentialsError":
            raise
        return fsspec.filesystem("s3", anon=True, skip_instance_cache=True)
    return signer


def _error_code(error: urllib.error.HTTPError) -> str:
    """Returns the word that S3 has for what is wrong."""
    try:
        found = re.search(rb"<Code>(\w+)</Code>", error.read(4096))
    except (OSError, http.client.HTTPException):
        return ""
    return found[1].decode() if found else ""


def _refusal(what: str, status: int, code: str) -> Exception:
    told = f"status {status} {http.client.responses.get(status, '')}".rstrip() + (f" ({code})" if code else "")
    if status in _TRANSIENT_STATUS or code in ("SlowDown", "RequestTimeout"):
        return TransientError(f"the server answers with {told}")
    advice = _ADVICE.get(status, "see the server's log for why it refuses")
    kind = NotThereError if status in (404, 410) else DabError
    return kind(f"{what}: {told}: {advice}")


def _no_answer(what: str, error: Exception) -> Exception:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DabError(
            f"{what}: the server's certificate is not trusted ({reason.verify_message}); name the file of the "
            "authority in SSL_CERT_FILE"
        )
    if isinstance(reason, TimeoutError):
        return TransientError(f"no answer for {_TIMEOUT_S:.0f} s")
    if isinstance(reason, http.client.IncompleteRead):
        return TransientError("the connection ended before the file did")
    if isinstance(reason, socket.gaierror):
        return TransientError(f"{urlsplit(what).hostname}: {reason.strerror}")
    if isinstance(reason, OSError):
        return TransientError(reason.strerror or type(reason).__name__)
    return TransientError(f"the answer is not HTTP ({type(reason).__name__})")
