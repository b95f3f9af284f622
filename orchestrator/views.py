"""What a command prints of what was computed: the JSON document, and the text for a person. Pure functions."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.output import Table

if TYPE_CHECKING:
    from dabnn.data import Manifest, Problem
    from dabnn.models import ModelTable

View = tuple[dict[str, Any], str]

_LAYER_COLUMNS = (
    "index", "path", "in_channels", "out_channels", "kernel", "stride", "padding", "binary_weights", "binary_inputs",
    "macs", "weight_bits", "bit_ops",
)  # fmt: skip


def dataset_view(manifest: "Manifest") -> View:
    """Return the splits and classes of a dataset."""
    splits = {
        name: {"num_samples": split.num_samples, "num_shards": len(split.shards), "num_bytes": split.num_bytes}
        for name, split in manifest.splits.items()
    }
    table = Table.of(
        [{"split": name, **sizes} for name, sizes in splits.items()],
        ["split", "num_samples", "num_shards", "num_bytes"],
    )
    return {"splits": splits, "classes": list(manifest.classes)}, f"{table}\n{len(manifest.classes)} classes"


def problems_view(dest: Path, problems: Sequence["Problem"]) -> View:
    """Return what is wrong with the dataset in `dest`."""
    records = [asdict(problem) for problem in problems]
    human = str(Table.of(records, ["shard", "kind", "detail"])) if records else f"{dest}: no problems"
    return {"ok": not records, "problems": records}, human


def model_view(table: "ModelTable") -> View:
    """Return a model's layers and sizes."""
    data = asdict(table)
    shape = "x".join(str(size) for size in table.input_shape)
    ratio = table.float_bytes / table.packed_bytes
    head = f"{table.name}: family {table.family}, variant {table.variant}, input {shape}"
    layers = Table.of(data["layers"], _LAYER_COLUMNS)
    sizes = f"{table.num_params:,} parameters, {table.float_bytes:,} bytes as float32"
    return data, f"{head}\n{layers}\n{sizes}, {table.packed_bytes:,} packed ({ratio:.1f}x smaller)"


def names_view(names: Sequence[str]) -> View:
    """Return the models of the zoo."""
    return {"models": list(names)}, "\n".join(names)
