"""What `dab models show` prints of a model that nobody has configured yet."""

import pytest

from dabnn.errors import InvalidInputError
from dabnn.models import names
from orchestrator.zoo import list_models, show_model

CONTRACT_KEYS = {
    "index", "path", "kind", "in_channels", "out_channels", "kernel", "stride", "padding", "binary_weights",
    "binary_inputs", "macs", "weight_bits", "bit_ops",
}  # fmt: skip


def test_every_model_is_listed():
    data, text = list_models()
    assert data["models"] == names() == text.splitlines()


def test_a_program_reads_all_keys():
    data, _ = show_model("resnethybridv318")
    assert {"name", "family", "variant", "input_shape", "num_params", "layers", "float_bytes", "packed_bytes"} <= set(
        data
    )
    assert all(set(layer) >= CONTRACT_KEYS for layer in data["layers"])


def test_a_person_reads_a_numbered_table_with_its_total():
    data, text = show_model("sketchanetfbin")
    head, columns, *rows, total, sizes = text.splitlines()
    assert head == "sketchanetfbin: family sketchanet, variant fbin, block reference, input 1x225x225"
    assert columns.split("  ")[0].strip() == "#"
    assert [row.split()[:2] for row in rows] == [[str(index), f"conv{index}"] for index in range(1, 9)]
    assert f"{sum(layer['macs'] for layer in data['layers']):,}" in total
    assert f"+{100 * data['dab_extra']:.2f} %" in total
    assert sizes.startswith("8,509,818 parameters")


def test_block_and_activation_are_shown():
    data, text = show_model("bincifarfbin", block="bireal", activation="rprelu", width=0.25)
    assert "block bireal" in text
    assert data["num_params"] > show_model("bincifarfbin", block="bireal", width=0.25)[0]["num_params"]


@pytest.mark.parametrize("in_channels", [0, 2, 4])
def test_images_have_one_channel_or_three(in_channels):
    with pytest.raises(InvalidInputError, match=rf"^model\.in_channels: {in_channels}, but images have 1 channel"):
        show_model("bincifarfbin", in_channels=in_channels)
