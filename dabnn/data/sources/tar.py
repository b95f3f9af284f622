"""Uncompressed tar files: where each member lies, from the headers alone.

Stricter than `tarfile`, which takes a damaged header for the end of the archive and would lose the rest without a word.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dabnn.data.sources.members import Member, no_file, safe_name, twice
from dabnn.errors import InvalidInputError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_HEADER_BYTES = 2**20
_EXTENDED = frozenset("Lxg")
_UNPACK = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}


def scan_tar(path: Path, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yields the members of an uncompressed tar file, or of one that lies inside another.

    Args:
        path: The file.
        start: Where the tar begins in it.
        end: Where it ends at the latest; by default where the file does.

    Yields:
        Regular files, and folders.

    Raises:
        InvalidInputError: The file is compressed, damaged or truncated, or has a member that is a link or device, or
            that lies outside, or one name twice.
    """
    seen: set[str] = set()
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        limit = os.fstat(descriptor).st_size if end is None else end
        position, extra = start, _Extra()
        while (header := os.pread(descriptor, max(0, min(_BLOCK, limit - position)), position)) != _ZEROS:
            _require_tar(path, header, position)
            kind, member = _parse_header(path, header, position, extra)
            if member.offset + member.num_bytes > limit:
                raise _damaged(path, f"{member.name!r} goes on after its end, at byte {limit:,}")
            if kind in _EXTENDED:
                extra = _read_extra(path, kind, os.pread(descriptor, member.num_bytes, member.offset), extra)
            else:
                extra = _Extra()
                name = safe_name(path, member.name)
                if name in seen and kind == "0":
                    raise twice(path, name)
                seen.add(name)
                if name:
                    yield Member(f"{name.rstrip('/')}/" if kind == "5" else name, member.offset, member.num_bytes)
            position = member.offset + -(-member.num_bytes // _BLOCK) * _BLOCK


@dataclass(frozen=True)
class _Extra:
    """What an extended header says about the member that follows it."""

    name: str | None = None
    num_bytes: int | None = None


def _read_extra(path: Path, kind: str, data: bytes, before: _Extra) -> _Extra:
    if kind == "L":
        return _Extra(os.fsdecode(data.partition(b"\0")[0]), before.num_bytes)
    if kind == "g":
        return before
    fields = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise _damaged(path, "an extended header is not in its format")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[key] = value
        data = data[int(length) :]
    name = os.fsdecode(fields[b"path"]) if b"path" in fields else before.name
    size = fields.get(b"size", b"")
    if any(key.startswith(b"GNU.sparse") for key in fields):
        raise no_file(path, name or "")
    return _Extra(name, int(size) if size.isdigit() else before.num_bytes)


def _require_tar(path: Path, header: bytes, position: int) -> None:
    if position == 0 and header[:2] in _UNPACK and header[257:262] != b"ustar":
        raise InvalidInputError(
            f"{path}: compressed as a whole, so that no image can be read at its place; run "
            f"`{_UNPACK[header[:2]]} --keep {path.name}` and give the .tar file, or unpack it"
        )
    if len(header) < _BLOCK:
        raise _damaged(path, f"it stops at byte {position + len(header):,}, without the mark of an end")


def _parse_header(path: Path, header: bytes, position: int, extra: _Extra) -> tuple[str, Member]:
    try:
        checksum, num_bytes = _number(header[148:156]), _number(header[124:136])
    except ValueError as error:
        raise _damaged(path, f"no tar header at byte {position:,}") from error
    if num_bytes < 0 or checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _damaged(path, f"the header at byte {position:,} has a wrong checksum")
    kind = header[156:157].replace(b"\0", b"0").decode("latin1")
    if kind in _EXTENDED:
        if num_bytes > _MAX_HEADER_BYTES:
            raise _damaged(path, f"an extended header of {num_bytes:,} bytes at byte {position:,}")
        return kind, Member("an extended header", position + _BLOCK, num_bytes)
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    full_name = os.fsdecode(name) if extra.name is None else extra.name
    if kind not in "075":
        raise no_file(path, full_name)
    if kind == "5" or full_name.endswith("/"):
        return "5", Member(full_name, position + _BLOCK, 0)
    return "0", Member(full_name, position + _BLOCK, num_bytes if extra.num_bytes is None else extra.num_bytes)


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _damaged(path: Path, what: str) -> InvalidInputError:
    return InvalidInputError(f"{path}: no tar archive, or damaged, or truncated: {what}; get it again")
