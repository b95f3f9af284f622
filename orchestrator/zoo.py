"""`dab models`: the models of the zoo, and the layers and sizes of one that nobody has configured yet."""

from dataclasses import asdict

from dabnn.models import build, describe, names
from dabnn.models.zoo import find
from orchestrator.output import Table, View

# What the published figures were measured with; a run takes the number of classes from its data set.
_PUBLISHED_CLASSES = {"sketchanet": 250, "bincifar": 10}
_LAYER_COLUMNS = (
    "index", "path", "in_channels", "out_channels", "kernel", "stride", "padding", "binary_weights", "binary_inputs",
    "macs", "weight_bits", "bit_ops",
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
    bin_start: int | None = None,
    bin_end: int | None = None,
) -> View:
    """Return the layers and sizes of a model.

    Args:
        name: Model of the zoo.
        num_classes: Number of logits; None is that of the publication.
        width: Factor on the number of channels of each layer.
        input_size: Side of the square input, pixels; None is the family's.
        in_channels: Channels of the images; None is the family's.
        bin_start: First layer with binary weights, from 1; None is the model's.
        bin_end: Last layer with binary weights; None is the model's.

    Raises:
        InvalidInputError: The model does not exist or cannot have these sizes or this range.
    """
    family, _ = find(name)
    net = build(
        name,
        num_classes=_PUBLISHED_CLASSES[family.name] if num_classes is None else num_classes,
        width=width,
        input_size=input_size,
        in_channels=in_channels,
        bin_start=bin_start,
        bin_end=bin_end,
    )
    table = describe(net)
    data = asdict(table)
    shape = "x".join(str(size) for size in table.input_shape)
    head = f"{table.name}: family {table.family}, variant {table.variant}, input {shape}"
    sizes = f"{table.num_params:,} parameters, {table.float_bytes:,} bytes as float32"
    ratio = table.float_bytes / table.packed_bytes
    human = f"{head}\n{Table.of(data['layers'], _LAYER_COLUMNS)}\n{sizes}, {table.packed_bytes:,} packed ({ratio:.1f}x)"
    return data, human
