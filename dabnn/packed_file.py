"""The packed file's format: one safetensors file whose header says what the bits mean and holds a checksum.

Of a layer with binary weights (F, C, kh, kw) the file holds `PATH.weight_bits`, uint8: its F * C * kh * kw mask bits
without gaps, in the order [F, kh, kw, C], least significant bit first, filled up with zeros to a whole byte; and
`PATH.alpha`, `PATH.beta`, one value a filter. Of a batch normalisation it holds `PATH.scale` and `PATH.shift`, or,
where a sign follows, `PATH.threshold`, one value a channel, and `PATH.falls_bits`, the bits of the channels whose sign
is +1 below it (`dabnn.models.folding`). Every other tensor stands under its name in the network's state.
Nothing that can be derived is stored, and nothing in the file can run code. The same model gives the same bytes.

`read_header` reads no more than the header, and believes no size in it that the file does not have, so that a reader
can compare it with what it expects before the tensors are read. Left out: what the tensors are for (`dabnn.packed`).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from dabnn.errors import InvalidInputError
from dabnn.whole_file import write_whole

FORMAT = "dab-packed"
# Version 1 kept the four vectors of each batch normalisation, which this reader folds.
VERSION = 2
# What a reader must agree on to understand the bits; another value is refused rather than misread.
MEANING = {
    "bit_order": "least significant bit first",
    "layout": "F,kh,kw,C without gaps, filled up to a byte",
    "padding": "zeros after the sign: a padded tap adds nothing",
}

# A packed model takes about 100 bytes for a tensor and for a class name.
MAX_HEADER_BYTES = 2**22
_LENGTH_BYTES = 8
_TYPE_BYTES = {"F32": 4, "F16": 2, "U8": 1}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class Header:
    """What a packed file says it holds; its types and sizes are those of the file.

    Attributes:
        metadata: The texts of the header, of the right format and version.
        spec: Arguments of `dabnn.models.build`, unchecked.
        extras: Further values, unchecked.
        shapes: Of the tensors by name.
        types: Of the tensors by name: F32, F16 or U8.
    """

    metadata: Mapping[str, str]
    spec: dict[str, Any]
    extras: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Content:
    """What a packed file holds.

    Attributes:
        spec: Arguments of `dabnn.models.build`.
        extras: Further JSON-able values: class names, normalization.
        tensors: The tensors by name, all on the CPU.
    """

    spec: dict[str, Any]
    extras: dict[str, Any]
    tensors: Mapping[str, Tensor]


def encode_mask(mask: Tensor) -> Tensor:
    """Returns the bits of a mask: bool (F, C, kh, kw) to uint8 (ceil(F * C * kh * kw / 8),)."""
    ordered = mask.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    return torch.from_numpy(np.packbits(ordered.reshape(-1), bitorder="little"))


def decode_mask(bits: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `encode_mask`: returns the bool mask of `shape` (F, C, kh, kw)."""
    filters, channels, height, width = shape
    flat = np.unpackbits(bits.numpy(), count=shape.numel(), bitorder="little")
    ordered = torch.from_numpy(flat.astype(bool)).view(filters, height, width, channels)
    # Not contiguous(), which keeps the strides of a 1x1 kernel: torch would sum in the order of channels_last.
    return ordered.permute(0, 3, 1, 2).reshape(-1).view(shape)


def write(path: Path, content: Content) -> int:
    """Writes a packed file in one step: readers see the old file, the whole new one, or none.

    Args:
        path: The file; an existing one is replaced.
        content: What goes in.

    Returns:
        Size of the file in bytes.

    Raises:
        InvalidInputError: The folder does not exist, or the header would be longer than a reader takes.
        DabError: The file cannot be written, for example because the disk is full; no part of it is left.
    """
    metadata = _metadata(content)
    data = safetensors_torch.save(dict(content.tensors), metadata | {"sha256": _digest(metadata, content.tensors)})
    return write_whole(path, _settled(path, data))


def read(path: Path) -> Content:
    """Reads and checks a packed file.

    Raises:
        InvalidInputError: There is no such file, or it is not a packed file, is damaged, or is of a newer version.
    """
    return read_tensors(path, read_header(path))


def read_header(path: Path) -> Header:
    """Reads and checks the header of a packed file, and no more.

    Raises:
        InvalidInputError: As for `read`, but for damage to the tensors.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            room = num_bytes - _LENGTH_BYTES
            data = file.read(length) if length <= min(room, MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error.strerror}). Give a file that dab export wrote."
        ) from error
    if room < 0:
        raise _not_whole(path, f"it has {num_bytes} bytes, and the length of a header alone takes {_LENGTH_BYTES}")
    if not data:
        limit = f"{room:,} bytes" if room < MAX_HEADER_BYTES else f"the limit of {MAX_HEADER_BYTES:,}"
        raise _not_whole(path, f"its header is said to take {length:,} bytes, of {limit}")
    entries = _object(path, data.decode(errors="replace"), "header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _not_whole(path, "its metadata are no texts")
    _check_metadata(path, metadata)
    sizes = [_check_entry(path, name, entry) for name, entry in entries.items()]
    if sum(sizes) != room - length:
        raise _not_whole(path, f"its header names {sum(sizes):,} bytes of tensors, and {room - length:,} follow")
    return Header(
        metadata,
        _object(path, metadata.get("spec", ""), "spec"),
        _object(path, metadata.get("extras", ""), "extras"),
        {name: tuple(entry["shape"]) for name, entry in entries.items()},
        {name: entry["dtype"] for name, entry in entries.items()},
    )


def read_tensors(path: Path, header: Header) -> Content:
    """Reads the tensors of a packed file whose header was read, and checks them against its checksum.

    Raises:
        InvalidInputError: The file is damaged.
    """
    try:
        tensors = safetensors_torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise _not_whole(path, str(error)) from error
    metadata = {key: value for key, value in header.metadata.items() if key != "sha256"}
    if _digest(metadata, tensors) != header.metadata.get("sha256"):
        raise InvalidInputError(
            f"{path}: its contents do not match their checksum: it is damaged. Export or copy it again."
        )
    return Content(header.spec, header.extras, tensors)


def _metadata(content: Content) -> dict[str, str]:
    fixed = {"format": FORMAT, "version": str(VERSION)} | MEANING
    return fixed | {"spec": json.dumps(content.spec), "extras": json.dumps(content.extras)}


def _settled(path: Path, data: bytes) -> bytes:
    """Returns a safetensors file with its metadata in order, which safetensors shuffles."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    entries = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH_BYTES)
    if len(header) > MAX_HEADER_BYTES:
        raise InvalidInputError(
            f"{path}: its header would take {len(header):,} bytes, and a reader takes {MAX_HEADER_BYTES:,} at most, so "
            "that no file makes it use more. Give shorter class names."
        )
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header + data[_LENGTH_BYTES + length :]


def _object(path: Path, text: str, name: str) -> dict[str, Any]:
    """Returns the JSON object that a text holds."""
    try:
        value = json.loads(text)
    # The first where a text nests too deeply.
    except (RecursionError, ValueError) as error:
        raise _not_whole(path, f"its {name} is no JSON") from error
    if not isinstance(value, dict):
        raise _not_whole(path, f"its {name} is no JSON object")
    return value


def _check_entry(path: Path, name: str, entry: Any) -> int:
    """Returns the bytes of a tensor, which the header gives as type, shape, and first and end byte."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys or not isinstance(entry["dtype"], str):
        raise _not_whole(path, f"{name} has no type, shape and place")
    shape, place = entry["shape"], entry["data_offsets"]
    if not all(isinstance(numbers, list) and all(map(_is_size, numbers)) for numbers in (shape, place)):
        raise _not_whole(path, f"shape and place of {name} are no sizes")
    if entry["dtype"] not in _TYPE_BYTES:
        raise InvalidInputError(
            f"{path}: {name} is of type {entry['dtype']}, and packed files hold {', '.join(_TYPE_BYTES)}. Export the "
            "model again with this dab."
        )
    if len(shape) > _MAX_DIMENSIONS or len(place) != 2:
        raise _not_whole(path, f"{name} has {len(shape)} dimensions")
    num_bytes = math.prod(shape) * _TYPE_BYTES[entry["dtype"]]
    if place[1] - place[0] != num_bytes:
        raise _not_whole(path, f"{name} takes {num_bytes:,} bytes, and has {place[1] - place[0]:,}")
    return num_bytes


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _not_whole(path: Path, reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"{path}: is no whole safetensors file ({reason}), so it is damaged, cut off or something else. "
        "Export or copy it again."
    )


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise InvalidInputError(
            f"{path}: a safetensors file, but not a packed model (format {metadata.get('format')!r}, not {FORMAT!r}). "
            "Give a file that dab export wrote."
        )
    version = metadata.get("version", "")
    if version not in map(str, range(1, VERSION + 1)):
        raise InvalidInputError(
            f"{path}: a packed model of format version {version!r}, and this dab reads versions 1 to {VERSION}. "
            "Update dab, or export the model again with this one."
        )
    for key, meaning in MEANING.items():
        if metadata.get(key) != meaning:
            raise InvalidInputError(
                f"{path}: {key} is {metadata.get(key)!r}, and this dab reads {meaning!r}; its bits would be misread. "
                "Export the model again with this dab."
            )


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the metadata and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
