"""`dab evaluate` of a packed file: the images are prepared as the file says, once or as ten crops."""

import json
from pathlib import Path

import pytest

import cli
from dabnn.deliver import evaluate_on
from dabnn.models import build
from dabnn.packed import Normalization, Provenance, load_packed, pack


def packed_file(folder: Path, transform: str) -> Path:
    """An untrained network, packed with the transform that it claims to be trained with."""
    net = build("bincifarfbin", num_classes=10, in_channels=1, input_size=16, width=0.0625, seed=0)
    path = folder / f"{transform}.safetensors"
    pack(net, normalization=Normalization((0.3,), (0.4,), transform), provenance=Provenance("3f2a")).save(path)
    return path


@pytest.mark.parametrize(("option", "ten_crop"), [([], False), (["--centre-crop"], False), (["--ten-crop"], True)])
def test_a_file_is_evaluated_as_asked(
    small_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], ten_crop: bool
) -> None:
    path = packed_file(tmp_path, "sketch")
    assert cli.run(["evaluate", str(path), "--data", str(small_digits), "--json", *option]) == 0
    found, packed = json.loads(capsys.readouterr().out), load_packed(path)
    assert packed.normalization is not None
    expected = evaluate_on(packed, packed.spec, packed.normalization, small_digits, ten_crop=ten_crop)
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["provenance"] == {"run_id": "3f2a", "git_commit": None, "data_digest": None, "dab_version": None}


def test_ten_crops_of_a_network_that_sees_whole_images_are_refused(
    small_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = packed_file(tmp_path, "plain")
    assert cli.run(["evaluate", str(path), "--data", str(small_digits), "--ten-crop"]) == 2
    assert "data.ten_crop: plain resizes images to the very size of the input" in capsys.readouterr().err
