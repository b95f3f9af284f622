import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from training import small_spec

from dabnn.checkpoints import best_checkpoint, load_state
from dabnn.data import load_manifest
from dabnn.deliver import evaluate_on, export, load_trained, predict, val_batches
from dabnn.distributed import World
from dabnn.errors import DabError, InvalidInputError
from dabnn.packed import Normalization, load_packed
from dabnn.run_folder import RunFolder
from dabnn.train import train


@pytest.fixture(scope="module")
def checkpoint(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a very narrow network after two epochs."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    train(small_spec(digits), folder, world=World.current())
    return Path(best_checkpoint(folder.checkpoints).path)


@pytest.fixture(scope="module")
def file(checkpoint: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its packed model."""
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    export(checkpoint, path, train_data=digits, val_data=digits)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handwritten digit as a file."""
    from sklearn.datasets import load_digits

    path = tmp_path_factory.mktemp("images") / "digit.png"
    Image.fromarray((load_digits().images[0] * 15).astype("uint8")).save(path)
    return path


def test_an_exported_network_is_the_trained_one(checkpoint: Path, digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "model.safetensors"
    verification, packed, num_bytes = export(checkpoint, path, train_data=digits, val_data=digits, batch_size=100)
    assert verification.problems == ()
    assert verification.layers_equal
    assert verification.num_samples == 359
    assert verification.same_argmax == 1.0
    assert verification.top1_packed == verification.top1_float_path
    assert num_bytes == path.stat().st_size < packed.float_bytes
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_exported_file_knows_its_classes_and_its_normalisation(file: Path, digits: Path) -> None:
    packed, manifest = load_packed(file), load_manifest(digits)
    assert packed.classes == manifest.classes
    mean, std = manifest.image.normalization(1)
    assert packed.normalization == Normalization(tuple(mean), tuple(std))


def test_run_and_file_evaluate_alike_with_any_batch_size(checkpoint: Path, file: Path, digits: Path) -> None:
    net, packed = load_trained(checkpoint), load_packed(file)
    assert packed.normalization is not None
    seen: list[int] = []
    of_net = evaluate_on(net, net.spec, packed.normalization, digits, batch_size=37)
    of_file = evaluate_on(packed, packed.spec, packed.normalization, digits, batch_size=100, on_batch=seen.append)
    assert seen == [100, 200, 300, 359]
    assert of_file["num_samples"] == 359
    assert {key: of_file[key] for key in ("top1", "top5")} == {key: of_net[key] for key in ("top1", "top5")}
    assert of_file["loss"] == pytest.approx(of_net["loss"], rel=1e-5)
    assert load_state(checkpoint)["metrics"]["val_top1"] == of_file["top1"]


def test_validation_batches_are_the_split_in_order(file: Path, digits: Path) -> None:
    packed = load_packed(file)
    assert packed.normalization is not None
    batches = list(val_batches(digits, packed.spec, packed.normalization, 100))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(359))
    assert batches[0].images.shape == (100, 1, 16, 16)


def test_data_of_other_classes_is_refused(file: Path, photos: Path) -> None:
    packed = load_packed(file)
    assert packed.normalization is not None
    with pytest.raises(InvalidInputError, match=rf"^--data: {photos} has 2 classes, the network tells 10 apart\."):
        evaluate_on(packed, packed.spec, packed.normalization, photos)


def test_data_whose_classes_have_other_names_is_refused(file: Path, digits: Path) -> None:
    packed = load_packed(file)
    assert packed.normalization is not None
    renamed = ("zero", *packed.classes[1:]) if packed.classes else ()
    with pytest.raises(InvalidInputError, match=r"has a class '0' where the network knows 'zero'"):
        evaluate_on(packed, packed.spec, packed.normalization, digits, classes=renamed)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two classes."""
    from dabnn.data import build_dataset

    root = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for label, shade in (("dark", 10), ("light", 240)):
            (root / "source" / split / label).mkdir(parents=True)
            for number in range(2):
                place = root / "source" / split / label / f"{number}.png"
                Image.new("L", (8, 8), shade + number).save(place)
    build_dataset(str(root / "source"), root / "built")
    return root / "built"


def test_where_rounding_turns_signs_only_what_no_sign_depends_on_is_rounded(
    checkpoint: Path, file: Path, digits: Path, tmp_path: Path
) -> None:
    """After two epochs answers lie so close together that the signs which rounding turns change most of them."""
    verification, packed, num_bytes = export(
        checkpoint, tmp_path / "half.dab", train_data=digits, val_data=digits, half=True
    )
    assert verification.problems == ()
    assert verification.flipped_signs == 0
    assert packed.rounded == "head"
    assert num_bytes < file.stat().st_size


def test_a_packed_network_that_disagrees_is_not_written(checkpoint: Path, digits: Path, tmp_path: Path) -> None:
    """In float16 the rows of this head are one and the same."""
    path, state = tmp_path / "out" / "model.safetensors", load_state(checkpoint)
    state["net"]["conv8.weight"] = 1 + 1e-5 * torch.sign(state["net"]["conv8.weight"])
    state["net"]["conv8.bias"].zero_()
    torch.save(state, tmp_path / "close.pt")
    with pytest.raises(DabError, match=r"^export: the packed network disagrees .* nothing was written: same_argmax: "):
        export(tmp_path / "close.pt", path, train_data=digits, val_data=digits, half=True)
    assert list(path.parent.iterdir()) == []


def test_a_failed_export_leaves_the_former_file_alone(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "model.safetensors"
    shutil.copyfile(file, kept)
    with pytest.raises(InvalidInputError, match=r"manifest\.json"):
        export(checkpoint, kept, train_data=tmp_path / "none", val_data=tmp_path / "none")
    assert kept.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is no checkpoint"), (b"no checkpoint", "is no checkpoint"), (None, "cannot be read")],
)
def test_what_is_no_checkpoint_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=f"^{path}.*{message}"):
        load_trained(path)


def test_a_prediction_names_five_classes_with_falling_probabilities(file: Path, image: Path) -> None:
    (seen, again) = predict(file, [image, image])
    assert seen == again
    assert seen.image == str(image)
    names, probabilities = zip(*seen.classes, strict=True)
    assert len(set(names)) == 5
    assert set(names) < {str(digit) for digit in range(10)}
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1 + 1e-6


def test_two_classes_give_two_predictions(digits: Path, photos: Path, image: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    model = small_spec(photos).model | {"num_classes": 2}
    train(small_spec(photos, model=model, epochs=1), folder, world=World.current())
    path = tmp_path / "two.safetensors"
    export(best_checkpoint(folder.checkpoints).path, path, train_data=photos, val_data=photos)
    (seen,) = predict(path, [image])
    assert {name for name, _ in seen.classes} == {"dark", "light"}
    assert sum(probability for _, probability in seen.classes) == pytest.approx(1)


@pytest.mark.parametrize("content", [b"no image", None])
def test_what_is_no_image_is_named(content: bytes | None, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=f"^{path}: no readable image"):
        predict(file, [path])


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_damaged_packed_file_is_named(cut: int, file: Path, image: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(InvalidInputError, match=f"^{damaged}: "):
        predict(damaged, [image])
