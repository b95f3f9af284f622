"""`dab models`: the models of the zoo, and the layers and sizes of one that nobody has configured yet."""

from dataclasses import asdict

from dabnn.errors import InvalidInputError
from dabnn.models import LayerRow, ModelTable, names, outline
from dabnn.models.zoo import find
from orchestrator.output import Table, View

_COLUMNS = (
    "#", "layer", "channels", "kernel", "weights", "inputs", "MACs", "bit ops", "float bytes", "packed bytes",
    "DAB over XNOR",
)  # fmt: skip


def list_models() -> View:
    """Return the names of all models."""
    return {"models": names()}, "\n".join(names())


def show_model(
    name: str,
    *,
    num_classes: int | None = None,
    width: float = 1.0,
    input_size: int | None = None,
    in_channels: int | None = None,
    block: str | None = None,
    activation: str | None = None,
    bin_start: int | None = None,
    bin_end: int | None = None,
) -> View:
    """Return the layers and sizes of a model.

    Args:
        name: Model of the zoo.
        num_classes: Number of logits; None is that of the publication.
        width: Factor on the number of channels of each layer.
        input_size: Side of the square input, pixels; None is the family's.
        in_channels: Channels of the images, 1 or 3; None is the family's.
        block: Order of the blocks; None is the model's.
        activation: relu or rprelu; None is the model's.
        bin_start: First layer with binary weights, from 1; None is the model's.
        bin_end: Last layer with binary weights; None is the model's.

    Raises:
        InvalidInputError: The model does not exist or cannot have these sizes or this range.
    """
    if in_channels not in (None, 1, 3):
        raise InvalidInputError(f"model.in_channels: {in_channels}, but images have 1 channel (grey) or 3 (colour).")
    family, _ = find(name)
    table = outline(
        name,
        num_classes=family.num_classes if num_classes is None else num_classes,
        width=width,
        input_size=input_size,
        in_channels=in_channels,
        block=block,
        activation=activation,
        bin_start=bin_start,
        bin_end=bin_end,
    )
    shape = "x".join(str(size) for size in table.input_shape)
    head = f"{table.name}: family {table.family}, variant {table.variant}, block {table.block}, input {shape}"
    rows = [*(_cells(row) for row in table.layers), _totals(table)]
    sizes = f"{table.num_params:,} parameters, {table.float_bytes:,} bytes as float32"
    ratio = table.float_bytes / table.packed_bytes
    return asdict(table), f"{head}\n{Table(_COLUMNS, rows)}\n{sizes}, {table.packed_bytes:,} packed ({ratio:.1f}x)"


def _cells(row: LayerRow) -> list[object]:
    stride = f"/{row.stride[0]}" if row.stride[0] > 1 else ""
    return [
        row.index,
        row.path,
        f"{row.in_channels}-{row.out_channels}",
        "x".join(map(str, row.kernel)) + stride,
        f"{row.weight_bits} bit",
        "sign" if row.binary_inputs else "real",
        row.macs,
        row.bit_ops,
        row.float_bytes,
        row.packed_bytes,
        _percent(row.dab_word_ops / row.xnor_word_ops if row.xnor_word_ops else None),
    ]


def _totals(table: ModelTable) -> list[object]:
    """Return the last row: operations of all convolutions, bytes of the whole model."""
    macs, bit_ops = (sum(getattr(row, field) for row in table.layers) for field in ("macs", "bit_ops"))
    return [
        "", "model", "", "", "", "", macs, bit_ops, table.float_bytes, table.packed_bytes, _percent(table.dab_extra),
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return "-" if share is None else f"+{100 * share:.2f} %"
