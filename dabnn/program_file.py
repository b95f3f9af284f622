"""The archive of a `torch.export` program, as `dabnn.export_program` writes it: read, and refused where it differs.

torch's own reader trusts a file: it unpickles what an entry asks it to, evaluates the texts of sizes, calls any
function of torch that a node names, and makes source code of names. So it gets an archive that is written here anew,
of entries that were compared with what the exporter writes:

- no entry but those of a program, and none pickled; weights are the bytes of their tensors, and just as many;
- operators are those of the networks of `dabnn.models` and of `kernels`, by their whole names;
- texts are plain names, sizes are whole numbers or the batch; all else that may hold code is left out.

Left out: how much memory a program takes when it runs, and what it computes.
"""

import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dabnn.errors import InvalidInputError

ABOUT = "dab.json"
_ROOT = "archive"
_MODEL, _WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
_CONSTANTS, _INPUTS = "data/constants/model_constants_config.json", "data/sample_inputs/model.pt"
_NEEDED = (f"extra/{ABOUT}", _MODEL, _WEIGHTS, _CONSTANTS, _INPUTS, "archive_version")
_KNOWN = (*_NEEDED, "archive_format", "byteorder", ".data/version", ".data/serialization_id")
_WEIGHT = re.compile(r"data/weights/weight_\d{1,6}")
# The largest description of a network of the zoo takes 0.4 MB.
_MAX_JSON_BYTES = 2**24
_ENCRYPTED = 1
_ITEM_BYTES = (1, 2, 4, 8)

_NAME = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]{0,199}")
_PATH = re.compile(r"|(?!__)[A-Za-z_][A-Za-z0-9_]*(\.(?!__)[A-Za-z0-9_]+){0,40}")
_BATCH = r"s\d{1,9}"
_TEXTS = {
    "fqn": _PATH,
    "parameter_name": _PATH,
    "buffer_name": _PATH,
    "path_name": re.compile(r"weight_\d{1,6}"),
    "expr_str": re.compile(rf"{_BATCH}|Symbol\('{_BATCH}'(, (positive|nonnegative|integer)=True){{0,3}}\)"),
    "torch_version": re.compile(r"[A-Za-z0-9_.+-]{1,80}"),
    # How arguments nest: tuples, lists and dicts.
    "in_spec": re.compile(r'([][{}:, 0-9]|null|"(type|context|children_spec|null|\[\]|builtins\.(tuple|list|dict))")*'),
}
_TEXTS["out_spec"] = _TEXTS["in_spec"]
# Guards repeat what `dabnn.exported` checks; the others are notes, or hold objects.
_LEFT_OUT = {"guards_code": list, "metadata": dict, "treespec_namedtuple_fields": dict, "custom_obj_values": dict}
_ARGUMENTS = {
    "as_bool", "as_bools", "as_expr", "as_float", "as_floats", "as_int", "as_ints", "as_layout", "as_memory_format",
    "as_name", "as_none", "as_optional_tensors", "as_scalar_type", "as_sym_int", "as_sym_ints", "as_tensor",
    "as_tensors",
}  # fmt: skip
_OPERATORS = {
    "adaptive_avg_pool2d.default", "add.Scalar", "add.Tensor", "add_.Tensor", "avg_pool2d.default",
    "batch_norm.default", "cat.default", "clamp_min.default", "clone.default", "contiguous.default", "conv2d.default",
    "detach.default", "div.Scalar", "div.Tensor", "expand.default", "flatten.using_ints", "full_like.default",
    "ge.Scalar", "ge.Tensor", "linear.default", "max_pool2d.default", "mean.dim", "mul.Scalar", "mul.Tensor",
    "new_zeros.default", "ones_like.default", "permute.default", "prelu.default", "promote_types.default",
    "relu.default", "relu_.default", "repeat.default", "reshape.default", "rsub.Scalar", "slice.Tensor", "sub.Scalar",
    "sub.Tensor", "sum.dim_IntList", "sym_size.int", "to.dtype", "unsqueeze.default", "view.default",
    "where.ScalarOther", "where.ScalarSelf", "where.self", "zeros_like.default",
}  # fmt: skip
_OPERATOR_OF_KERNELS = re.compile(r"torch\.ops\.dab\.[a-z][a-z0-9_]*\.default")


def read_program(path: Path) -> tuple[dict[str, str], io.BytesIO]:
    """Return what a program says of itself, and an archive of it in which torch's reader finds no code to run.

    Raises:
        InvalidInputError: There is no such file, or it is damaged, or is no program that dab export writes.
    """
    entries = _entries(path)
    about = _object(path, entries, f"extra/{ABOUT}")
    if not all(isinstance(value, str) for value in about.values()):
        raise _no_program(path, f"its {ABOUT} is no JSON object of texts")
    model = _object(path, entries, _MODEL)
    weights = _object(path, entries, _WEIGHTS)
    _check_weights(path, weights, entries)
    if _object(path, entries, _CONSTANTS) != {"config": {}} or entries[_INPUTS]:
        raise _no_program(path, "it holds constants or inputs beside its weights")
    entries[_MODEL] = json.dumps(_checked(path, "", model)).encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        for name, data in entries.items():
            target.writestr(f"{_ROOT}/{name}", data)
    archive.seek(0)
    return about, archive


def _entries(path: Path) -> dict[str, bytes]:
    """Return the contents of an archive by their names in its folder, compared with their checksums."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error.strerror}). Give a file that dab export wrote."
        ) from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = archive.infolist()
            _check_contents(path, found, len(data))
            return {entry.filename.partition("/")[2]: archive.read(entry) for entry in found}
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, OverflowError, struct.error, zlib.error) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(
            f"{path}: is no whole torch.export program ({error}), so it is damaged, cut off or something else. Export "
            "or copy it again."
        ) from error


def _check_contents(path: Path, found: list[zipfile.ZipInfo], num_bytes: int) -> None:
    """Refuse entries that are not of a program, or would take more memory than the file has bytes."""
    names = [entry.filename.partition("/")[2] for entry in found]
    if f"extra/{ABOUT}" not in names:
        raise _no_program(path, f"it holds no {ABOUT}")
    if len({entry.filename.partition("/")[0] for entry in found}) != 1 or len(set(names)) != len(names):
        raise _no_program(path, "it holds two folders, or two entries of one name")
    for name, entry in zip(names, found, strict=True):
        if name not in _KNOWN and not _WEIGHT.fullmatch(name):
            raise _no_program(path, f"it holds {name[:100]}, which is no part of a program")
        is_text = name.endswith(".json")
        kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) if is_text else (zipfile.ZIP_STORED,)
        if entry.compress_type not in kinds or entry.flag_bits & _ENCRYPTED:
            raise _no_program(path, f"its {name} is packed in a way that dab does not use")
        if is_text and entry.file_size > _MAX_JSON_BYTES:
            raise _no_program(path, f"its {name} takes {entry.file_size:,} bytes, of {_MAX_JSON_BYTES:,} at most")
    for name in _NEEDED:
        if name not in names:
            raise _no_program(path, f"it holds no {name}")
    if sum(entry.file_size for entry in found if not entry.filename.endswith(".json")) > num_bytes:
        raise _no_program(path, "its entries are said to be longer than the file")


def _object(path: Path, entries: Mapping[str, bytes], name: str) -> dict[str, Any]:
    short = name.rpartition("/")[2]
    try:
        value = json.loads(entries[name])
    except (RecursionError, ValueError) as error:
        raise _no_program(path, f"its {short} is no JSON") from error
    if not isinstance(value, dict):
        raise _no_program(path, f"its {short} is no JSON object{' of texts' if short == ABOUT else ''}")
    return value


def _check_weights(path: Path, weights: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
    """Refuse weights that are not the bytes of their tensors."""
    config = weights.get("config")
    if set(weights) != {"config"} or not isinstance(config, dict):
        raise _no_program(path, "its weights are not described")
    for name, weight in config.items():
        if not _PATH.fullmatch(name) or not isinstance(weight, dict) or weight.get("use_pickle") is not False:
            raise _no_program(path, f"its weight {name[:100]!r} is pickled, which may run code")
        _checked(path, "", weight)
        numel = math.prod(_sizes(weight.get("tensor_meta")))
        place = weight.get("path_name")
        num_bytes = len(entries.get(f"data/weights/{place}", b""))
        if not any(num_bytes == size * numel for size in _ITEM_BYTES):
            raise _no_program(path, f"its {place} takes {num_bytes:,} bytes, and {name} has {numel:,} values")


def _sizes(meta: Any) -> list[int]:
    """Return the sizes of a tensor; [0] where they are no positive numbers."""
    sizes = meta.get("sizes") if isinstance(meta, dict) else None
    numbers = [size.get("as_int") if isinstance(size, dict) else None for size in sizes or []]
    known = [number for number in numbers if type(number) is int and number > 0]
    return known if isinstance(sizes, list) and len(known) == len(numbers) else [0]


def _checked(path: Path, key: str, value: Any) -> Any:
    """Return a part of a description without what is left out; refuse texts that are not those of the exporter."""
    if key in _LEFT_OUT:
        return _LEFT_OUT[key]()
    if isinstance(value, list):
        return [_checked(path, key, each) for each in value]
    if isinstance(value, dict):
        for name in value:
            if not _NAME.fullmatch(name) or (name.startswith("as_") and name not in _ARGUMENTS):
                raise _no_program(path, f"its {_MODEL} holds {name[:100]!r}")
        return {name: _checked(path, name, each) for name, each in value.items()}
    if isinstance(value, str) and not _is_known(key, value):
        raise _no_program(path, f"its {_MODEL} holds {value[:100]!r} as {key}")
    return value


def _is_known(key: str, text: str) -> bool:
    if key == "target":
        return text.removeprefix("torch.ops.aten.") in _OPERATORS or bool(_OPERATOR_OF_KERNELS.fullmatch(text))
    return bool(_TEXTS.get(key, _NAME).fullmatch(text))


def _no_program(path: Path, reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"{path}: is no program that dab export writes ({reason}), and others may run code, so it was not read. Export "
        "the model again."
    )
