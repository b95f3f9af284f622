"""Layer tables of models that nobody has configured yet, for `dab models show`."""

import torch

from dabnn.models import ModelTable, build, describe
from dabnn.models.zoo import find

# What the published figures were measured with; a run takes the number of classes from its data set.
_PUBLISHED_CLASSES = {"sketchanet": 250, "bincifar": 10}


def layer_table(
    name: str,
    *,
    num_classes: int | None = None,
    width: float = 1.0,
    input_size: int | None = None,
    in_channels: int | None = None,
    bin_start: int | None = None,
    bin_end: int | None = None,
) -> ModelTable:
    """Return the table of a model, without making its weights.

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
    with torch.device("meta"):
        net = build(
            name,
            num_classes=_PUBLISHED_CLASSES[family.name] if num_classes is None else num_classes,
            width=width,
            input_size=input_size,
            in_channels=in_channels,
            bin_start=bin_start,
            bin_end=bin_end,
        )
    return describe(net)
