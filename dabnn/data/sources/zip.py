"""Zip archives: their table, checked, and one image at a time, stored or deflated."""

import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dabnn.data.sources.members import Member, no_file, safe_name, twice
from dabnn.data.sources.records import Record, read_at
from dabnn.errors import DabError, InvalidInputError

_MAX_IMAGE_BYTES = 2**30
_ZIP_HEADER_BYTES = 30
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


def scan_zip(path: Path) -> Iterator[Member]:
    """Yields the members of a zip file; the offset is that of the member's local header.

    Args:
        path: The file.

    Yields:
        Files, and folders.

    Raises:
        InvalidInputError: The file is damaged, or has a member that is a link, encrypted, lies outside, is compressed
            in a way that is not read here, or appears twice.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise InvalidInputError(f"{path}: not a zip archive, or damaged ({error}); get it again") from error
    seen = set()
    for info in listed:
        name = safe_name(path, info.filename)
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise no_file(path, name)
        if info.flag_bits & 1 or info.compress_type not in _ZIP_METHODS or info.file_size > _MAX_IMAGE_BYTES:
            raise InvalidInputError(
                f"{path}: member {name!r} is encrypted, larger than {_MAX_IMAGE_BYTES // 2**20} MiB, or compressed by "
                f"another method than deflate (method {info.compress_type}); unpack the archive and give the folder"
            )
        if info.header_offset < 0:
            raise InvalidInputError(f"{path}: damaged: {name!r} lies before the archive's beginning; get it again")
        if name in seen:
            raise twice(path, name)
        seen.add(name)
        yield Member(name, info.header_offset, info.file_size)


@dataclass(frozen=True)
class ZipRead:
    """Reads an image out of a zip archive; a record's place is the offset of its local header."""

    root: Path

    def __call__(self, record: Record) -> bytes:
        """Returns the image's bytes.

        Raises:
            DabError: They are not there as the archive's table says.
        """
        if record.place is None:
            return (self.root / record.name).read_bytes()
        path = self.root / record.place[0]
        header = read_at(path, record.place[1], _ZIP_HEADER_BYTES)
        if len(header) < _ZIP_HEADER_BYTES or header[:4] != b"PK\x03\x04":
            raise DabError(f"{path}: {record.name} is not where the archive's table says; get the archive again")
        skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = record.place[1] + _ZIP_HEADER_BYTES + skipped
        if int.from_bytes(header[8:10], "little") == zipfile.ZIP_STORED:
            data = read_at(path, start, record.num_bytes)
        else:
            # Deflate adds at most 5 bytes a block of 16 kB to what it cannot make smaller.
            data = _inflate(path, record, read_at(path, start, record.num_bytes + record.num_bytes // 1000 + 64))
        if len(data) != record.num_bytes:
            raise DabError(
                f"{path}: {record.name} has {len(data):,} bytes, not the {record.num_bytes:,} of the archive's table; "
                "get the archive again"
            )
        return data


def _inflate(path: Path, record: Record, data: bytes) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, record.num_bytes + 1)
    except zlib.error as error:
        raise DabError(f"{path}: {record.name} is damaged ({error}); get the archive again") from error
