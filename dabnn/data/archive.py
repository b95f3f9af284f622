"""WebDataset archives as anybody's reader sees them: from front to back, without an index, and without extracting.

Read with the standard library's `tarfile`, which is not what wrote them. What a reader has to fear is yielded between
the samples: names that lead out of a folder, members that are no files.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dabnn.data.images import EXTENSIONS
from dabnn.data.sources.webdataset import label_in_json

_TAR_BLOCK = 512


@dataclass
class ArchivedSample:
    """The members of an archive that follow each other and have one key: the name up to the first dot.

    Attributes:
        key: The key.
        images: The image files.
        offsets: Where they lie in the archive.
        labels: What the members `KEY.cls` hold; where there is none, the label in `KEY.json`.
        tables: What the members `KEY.json` hold.
    """

    key: str
    images: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    labels: list[bytes] = field(default_factory=list)
    tables: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class StrangeMember:
    """A member that no dataset needs.

    Attributes:
        name: Its name.
        reason: What is strange about it.
    """

    name: str
    reason: str


class _File(io.FileIO):
    """A file that takes no more memory for what is read than it has bytes, whatever a header says."""

    def read(self, size: int | None = -1, /) -> bytes:
        num_bytes = os.fstat(self.fileno()).st_size
        return super().read(num_bytes if size is None else min(size, num_bytes)) or b""


def read_archive(path: Path) -> Iterator[ArchivedSample | StrangeMember]:
    """Reads an archive.

    Args:
        path: An uncompressed tar file.

    Yields:
        The samples (keys without an image and a label are none) under their names without `./`, and what is strange.

    Raises:
        tarfile.TarError: It is no tar file, or ends in the middle of a member.
        ValueError: A header is damaged, so that what follows cannot be read.
    """
    current = ArchivedSample("")
    with _File(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        limit = os.fstat(file.fileno()).st_size
        for member in archive:
            # Before anything is read: memory for a size that a header only claims may not be there.
            if not member.offset < archive.offset <= limit:
                raise ValueError(f"{member.name!r} at byte {member.offset:,} goes on after the end, byte {limit:,}")
            reason = _strangeness(member)
            if reason is not None:
                yield StrangeMember(member.name, reason)
            if not _is_plain(member):
                continue
            name = _plain_name(member.name)
            key = _key(name)
            if key != current.key:
                yield from _if_sample(current)
                current = ArchivedSample(key)
            _add(current, name, member, file.fileno())
        yield from _if_sample(current)
        # tarfile takes a damaged header for the end.
        if os.pread(file.fileno(), _TAR_BLOCK, archive.offset).strip(b"\0"):
            raise ValueError(f"the header at byte {archive.offset:,} is damaged, so what follows is lost")


def _if_sample(sample: ArchivedSample) -> list[ArchivedSample]:
    if sample.images and not sample.labels:
        numbers = [label_in_json(data) for data in sample.tables]
        sample.labels += [str(number).encode() for number in numbers if number is not None]
    return [sample] if sample.images or sample.labels else []


def _plain_name(name: str) -> str:
    """Returns a name without the `./` that `tar -cf x.tar .` begins each with."""
    return "/".join(part for part in name.split("/") if part != ".")


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _add(sample: ArchivedSample, name: str, member: tarfile.TarInfo, descriptor: int) -> None:
    if name.rpartition(".")[2].lower() in EXTENSIONS:
        sample.images.append(os.pread(descriptor, member.size, member.offset_data))
        sample.offsets.append(member.offset_data)
    elif name == f"{sample.key}.cls":
        sample.labels.append(os.pread(descriptor, member.size, member.offset_data))
    elif name == f"{sample.key}.json":
        sample.tables.append(os.pread(descriptor, member.size, member.offset_data))


def _is_plain(member: tarfile.TarInfo) -> bool:
    # The size of a sparse file is not what lies in the archive.
    return member.isreg() and not member.issparse()


def _strangeness(member: tarfile.TarInfo) -> str | None:
    parts = member.name.replace("\\", "/").split("/")
    if not parts[0] or ".." in parts or parts[0][1:] == ":":
        return "the name is absolute or leads out of the folder that it is unpacked in; never unpack this file"
    if not _is_plain(member) and not member.isdir():
        return "a link, a device or something else that is no file; never unpack this file"
    return None
