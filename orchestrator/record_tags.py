"""What every run and every trial is recorded with beside its parameters: digests of what it is, and the data it reads.

Digests answer "which runs are comparable?": equal `dab.model_digest`, the same architecture; equal `dab.plan_digest`,
the same layers with binary weights and binary inputs; equal `dab.data_digest`, the same training data.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dabnn.data import load_manifest
from dabnn.errors import DabError
from dabnn.models.table import ModelTable
from orchestrator.config import Config
from orchestrator.resolve import model_table
from orchestrator.tracking import DataInput

_DIGEST_CHARS = 16
_ARCHITECTURE = ("path", "kind", "in_channels", "out_channels", "kernel", "stride", "padding")
_PLAN = ("path", "binary_weights", "binary_inputs")


@dataclass(frozen=True)
class Record:
    """What a run is recorded with.

    Attributes:
        tags: dab.model_digest, dab.plan_digest, dab.packed_bytes and dab.data_digest.
        inputs: The training data and the validation data.
    """

    tags: dict[str, str]
    inputs: tuple[DataInput, ...]


def record_of(config: Config) -> Record:
    """Return tags and data of a resolved configuration, for `tracking.create_run`.

    What cannot be told, of a model that cannot be or data that cannot be read, is left out: the run itself fails with
    the reason, and is recorded all the same.
    """
    tags: dict[str, str] = {}
    inputs: tuple[DataInput, ...] = ()
    try:
        tags |= model_tags(model_table(config), config)
        inputs = _inputs(config.data.train, config.data.val or config.data.train)
    except DabError:
        pass
    if inputs:
        tags["dab.data_digest"] = inputs[0].digest
    return Record(tags, inputs)


def model_tags(table: ModelTable, config: Config) -> dict[str, str]:
    """Return the digests of an architecture and of its layer plan, and the size of the packed model."""
    form = [table.family, table.block, config.model.activation, table.input_shape, config.model.num_classes]
    return {
        "dab.model_digest": _digest([form, _columns(table, _ARCHITECTURE)]),
        "dab.plan_digest": _digest(_columns(table, _PLAN)),
        "dab.packed_bytes": str(table.packed_bytes),
    }


@lru_cache(maxsize=4)  # a manifest behind a URL takes a request, and the trials of a sweep share theirs
def _inputs(train: str, val: str) -> tuple[DataInput, ...]:
    return _input(train, "train"), _input(val, "val")


def _input(place: str, split: str) -> DataInput:
    manifest = load_manifest(place)
    found = manifest.split(split)
    return DataInput(place, split, manifest.digest, found.num_samples, found.num_bytes, len(manifest.classes))


def _columns(table: ModelTable, names: tuple[str, ...]) -> list[list[Any]]:
    return [[getattr(row, name) for name in names] for row in table.layers]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_DIGEST_CHARS]
