"""Bytes of packed files, derived anew from the layer table: a bit a binary weight, two scalars a binary filter."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from dabnn import packed, packed_file
from dabnn.layers import BinaryConv2d
from dabnn.models import ModelTable, Network, describe, names, skeleton
from dabnn.models.folding import sign_norms

CLASSES = {
    name: model["num_classes"]
    for name, model in json.loads((Path(__file__).parent / "reference_models.json").read_text()).items()
}


def network(name: str) -> Network:
    return skeleton(name, num_classes=CLASSES.get(name, 10))


def shapes_in_the_file(net: Network) -> dict[str, tuple[int, ...]]:
    return packed._lay_out("net", asdict(net.spec)).folded_shapes()


def derived_bytes(net: Network, table: ModelTable) -> int:
    """Convolutions as the table has them, BN folded, all else in float32."""
    convs = {path: module for path, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    total = 0
    for row in table.layers:
        conv = convs.pop(row.path)
        num_weights = row.out_channels * row.in_channels // conv.groups * row.kernel[0] * row.kernel[1]
        total += math.ceil(num_weights / 8) + 8 * row.out_channels if row.weight_bits == 1 else 4 * num_weights
        total += 0 if conv.bias is None else 4 * row.out_channels
        total += 4 * row.in_channels if isinstance(conv, BinaryConv2d) and conv.input_shift is not None else 0
    assert not convs
    signs = sign_norms(net)
    for path, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            total += 4 * channels + math.ceil(channels / 8) if path in signs else 8 * channels
        elif not isinstance(module, nn.Conv2d):
            total += 4 * sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return total


@pytest.mark.parametrize("name", names())
def test_tensors_of_the_file_take_what_the_layer_table_says(name: str) -> None:
    net = network(name)
    found = shapes_in_the_file(net)
    num_bytes = sum(math.prod(shape) * (1 if key.endswith("_bits") else 4) for key, shape in found.items())
    table = describe(net)
    assert num_bytes == derived_bytes(net, table) == table.packed_bytes


@pytest.mark.parametrize(
    ("name", "half", "minimum"),
    [
        ("sketchanetfbin", False, 20),
        ("resnetfbin18", False, 22),
        ("googlenetfbin", False, 12),
        ("alexnetfbin", False, 10),
        ("alexnetfbin", True, 16),
        ("squeezenetfbin", False, 5),
    ],
)
def test_whole_files_of_the_published_models_shrink_as_promised(
    name: str, half: bool, minimum: int, tmp_path: Path
) -> None:
    """Of zeros: a file's size depends on its shapes alone."""
    net = network(name)
    real = torch.float16 if half else torch.float32
    tensors = {
        key: torch.zeros(shape, dtype=torch.uint8 if key.endswith("_bits") else real)
        for key, shape in shapes_in_the_file(net).items()
    }
    extras = {"classes": None, "normalization": None, "provenance": asdict(packed.Provenance(*["0" * 40] * 4))}
    file_bytes = packed_file.write(tmp_path / "model.dab", packed_file.Content(asdict(net.spec), extras, tensors))
    table = describe(net)
    assert table.float_bytes / file_bytes >= minimum
    assert file_bytes < table.packed_bytes + 130 * len(tensors) + 2500
