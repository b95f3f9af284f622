"""The packed file's format: one safetensors file whose header says what the bits mean and holds a checksum.

Of a layer with binary weights (F, C, kh, kw) the file holds `PATH.weight_bits`, uint8: its F * C * kh * kw mask bits
without gaps, in the order [F, kh, kw, C], least significant bit first, filled up with zeros to a whole byte; and
`PATH.alpha`, `PATH.beta`, one value a filter. Of a batch normalisation it holds `PATH.scale` and `PATH.shift`, or,
where a sign follows, `PATH.threshold`, one value a channel, and `PATH.falls_bits`, the bits of the channels whose sign
is +1 below it (`dabnn.models.folding`). Every other tensor stands under its name in the network's state.
Nothing that can be derived is stored, and nothing in the file can run code. Left out: what the tensors are for
(`dabnn.packed`).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from dabnn.errors import DabError, InvalidInputError

FORMAT = "dab-packed"
# Version 1 kept the four vectors of each batch normalisation, which this reader folds.
VERSION = 2
# What a reader must agree on to understand the bits; another value is refused rather than misread.
MEANING = {
    "bit_order": "least significant bit first",
    "layout": "F,kh,kw,C without gaps, filled up to a byte",
    "padding": "zeros after the sign: a padded tap adds nothing",
}


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
        InvalidInputError: The folder does not exist.
        DabError: The file cannot be written, for example because the disk is full; no part of it is left.
    """
    if not path.parent.is_dir():
        raise InvalidInputError(f"{path}: the folder {path.parent} does not exist. Create it, or name another file.")
    metadata = _metadata(content)
    data = safetensors_torch.save(dict(content.tensors), metadata | {"sha256": _digest(metadata, content.tensors)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DabError(
            f"{path}: {len(data):,} bytes could not be written ({error.strerror}); nothing was left behind. "
            "Free some space, or name a file elsewhere."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(data)


def read(path: Path) -> Content:
    """Reads and checks a packed file.

    Raises:
        InvalidInputError: There is no such file, or it is not a packed file, is damaged, or is of a newer version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error.strerror}). Give a file that dab export wrote."
        ) from error
    try:
        tensors = safetensors_torch.load(data)
    except SafetensorError as error:
        raise InvalidInputError(
            f"{path}: is no whole safetensors file ({error}), so it is damaged, cut off or something else. "
            "Export or copy it again."
        ) from error
    metadata = _read_metadata(data)
    _check_metadata(path, metadata)
    expected = metadata.pop("sha256", "")
    if _digest(metadata, tensors) != expected:
        raise InvalidInputError(
            f"{path}: its contents do not match their checksum: it is damaged. Export or copy it again."
        )
    return Content(json.loads(metadata["spec"]), json.loads(metadata["extras"]), tensors)


def _metadata(content: Content) -> dict[str, str]:
    fixed = {"format": FORMAT, "version": str(VERSION)} | MEANING
    return fixed | {"spec": json.dumps(content.spec), "extras": json.dumps(content.extras)}


def _read_metadata(data: bytes) -> dict[str, str]:
    """Returns the strings in the header of a valid safetensors file: 8 bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))


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
