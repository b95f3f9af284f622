"""Where a dataset lies: a folder on this machine, or one behind `file://`, `http://`, `https://` or `s3://`.

A URL may hold no user name or password, and what follows a `?` (a signature) never appears in a message.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from dabnn.data import remote
from dabnn.data.remote import NotThereError, is_url, shown
from dabnn.errors import InvalidInputError

SCHEMES = ("file", "http", "https", "s3")


@dataclass(frozen=True)
class Location:
    """A folder on this machine or behind a URL; make one with `Location.of`.

    Attributes:
        place: Absolute or relative path of a folder on this machine, or a URL without a slash at its end.
        is_local: Whether it is on this machine.
    """

    place: str
    is_local: bool

    @classmethod
    def of(cls, root: "Path | str | Location") -> "Location":
        """Returns the location that a path or URL names.

        Raises:
            InvalidInputError: The URL is of another kind, or holds a user name or password.
        """
        if isinstance(root, Location):
            return root
        text = str(root)
        if isinstance(root, Path) or not is_url(text):
            return cls(text, is_local=True)
        parts = _checked(text)
        if parts.scheme == "file":
            return cls(unquote(parts.path), is_local=True)
        return cls(urlunsplit(parts._replace(path=parts.path.rstrip("/"), fragment="")), is_local=False)

    @property
    def path(self) -> Path:
        """The folder; only of a location on this machine."""
        if not self.is_local:
            raise ValueError(f"{self}: is not a folder on this machine")
        return Path(self.place)

    def child(self, name: str) -> str:
        """Returns the path or URL of a file; a name that is a URL or an absolute path itself is returned as it is."""
        if is_url(name):
            _checked(name)
            return name
        if self.is_local:
            return str(self.path / name)
        parts = urlsplit(self.place)
        quoted = name if parts.scheme == "s3" else quote(name)
        return urlunsplit(parts._replace(path=f"{parts.path}/{quoted}"))

    def read_bytes(self, name: str, retry_s: float = 30.0) -> bytes:
        """Reads a small file.

        Args:
            name: Its name, or a URL.
            retry_s: How long to go on asking a server that does not answer.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: A file of this machine cannot be read.
            DabError: The server refuses, or does not answer.
        """
        place = Location.of(self.child(name))
        if place.is_local:
            return place.path.read_bytes()
        try:
            return remote.read_bytes(place.place, retry_s)
        except NotThereError as error:
            raise FileNotFoundError(str(error)) from None

    def __str__(self) -> str:
        return shown(self.place)


def _checked(url: str) -> SplitResult:
    """Returns the parts of a URL that can be read and holds no secret in front of its host.

    Raises:
        InvalidInputError: It is of another kind, or holds a user name or password.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise InvalidInputError(
            f"{shown(url)}: {parts.scheme}:// is not read; use one of {', '.join(SCHEMES)}, or a folder"
        )
    if "@" in parts.netloc:
        raise InvalidInputError(
            f"{shown(url)}: holds a user name or password, which would end up in logs and records; s3:// takes "
            "credentials from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE), http servers take signed URLs"
        )
    if any(character.isspace() or not character.isprintable() for character in url):
        raise InvalidInputError(f"{shown(url)!r}: holds a space or control character; write it as %20")
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        raise InvalidInputError(f"{shown(url)}: names a machine; file:// is for this one, as file:///absolute/path")
    if parts.scheme != "file" and not parts.netloc:
        what = "bucket" if parts.scheme == "s3" else "host"
        raise InvalidInputError(f"{shown(url)}: names no {what}; write {parts.scheme}://{what.upper()}/path")
    return parts
