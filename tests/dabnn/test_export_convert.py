import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from exported_nets import network
from PIL import Image

from dabnn.convert import Form, convert, form_of, load_model
from dabnn.deliver import evaluate_on, export_converted, predict
from dabnn.errors import DabError, InvalidInputError
from dabnn.packed import Normalization, PackedModel, pack
from dabnn.verify import Labelled


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    """An untrained packed network for the digits."""
    net = network(name="bincifarfbin", in_channels=1, num_classes=10)
    return pack(net, classes=[str(digit) for digit in range(10)], normalization=Normalization((0.3,), (0.4,)))


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_file_is_compared_on_every_validation_image_and_then_evaluates_and_predicts_alike(
    form: Form, packed: PackedModel, digits: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new folder" / f"model.{form}"
    found = export_converted(packed, file, form, digits, 100)
    assert (found.form, found.num_samples, found.layers_equal) == (form, 359, True)
    assert found.same_argmax >= 0.995
    assert found.max_abs_logit_diff < 1e-3
    assert found.file_bytes == file.stat().st_size < packed.float_bytes
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    loaded = load_model(file)
    assert loaded.normalization is not None
    metrics = evaluate_on(loaded, loaded.spec, loaded.normalization, digits, classes=loaded.classes)
    assert metrics["top1"] == pytest.approx(found.top1)

    packed.save(tmp_path / "model.safetensors")
    Image.new("L", (8, 8), 99).save(tmp_path / "x.png")
    (seen,), (expected,) = (predict(name, [tmp_path / "x.png"]) for name in (file, tmp_path / "model.safetensors"))
    assert [name for name, _ in seen.classes] == [name for name, _ in expected.classes]


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_file_that_disagrees_is_not_written(form: Form, packed: PackedModel, digits: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    tensors["conv4.alpha"] *= 1.01
    changed = replace(packed, tensors=tensors)
    with pytest.raises(
        DabError, match=rf"^export: the {form} file disagrees .* nothing was written: (conv4|same_argmax)"
    ):
        export_converted(changed, tmp_path / f"model.{form}", form, digits, 100)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_written_without_an_image_to_compare_it_on(packed: PackedModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^data\.val: not one image"):
        convert(packed, tmp_path / "model.onnx", "onnx", [])
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_write_one_file_at_once(packed: PackedModel, tmp_path: Path) -> None:
    seen: list[str] = []

    def no_images() -> Iterator[Labelled]:
        seen.extend(path.name for path in tmp_path.iterdir())
        yield from ()

    with pytest.raises(InvalidInputError, match="not one image"):
        convert(packed, tmp_path / "model.onnx", "onnx", no_images())
    assert seen == [f".unchecked-{os.getpid()}.model.onnx"]


@pytest.mark.parametrize(
    ("name", "given", "form"),
    [
        ("a.onnx", None, "onnx"),
        ("a.pt2", None, "pt2"),
        ("a.safetensors", None, "packed"),
        ("a", None, "packed"),
        ("a.onnx", "onnx", "onnx"),
        ("a.dab", "packed", "packed"),
        ("a.ONNX", None, "onnx"),
        ("a.Pt2", "pt2", "pt2"),
    ],
)
def test_the_form_follows_from_the_name(name: str, given: str | None, form: str) -> None:
    assert form_of(Path(name), given) == form


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("a.dab", "onnx", r"^--format: onnx for a\.dab, .* read as packed\. Give a name that ends in \.onnx\."),
        ("a.pt2", "packed", r"^--format: packed for a\.pt2, .* read as pt2\. Give a name that does not end in \.pt2\."),
        ("a.tflite", "tflite", r"^--format: no 'tflite'\. Give one of packed, onnx, pt2"),
    ],
)
def test_a_form_that_the_name_denies_is_refused(name: str, given: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        form_of(Path(name), given)
