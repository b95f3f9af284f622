import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from range_server import RangeServer
from s3_server import S3Server

from dabnn.distributed import World
from dabnn.errors import DabError, InvalidInputError
from dabnn.learner import Learner, checkpoint_bytes
from dabnn.models import build
from orchestrator.config import Config, load_config, resolve_paths
from orchestrator.resolve import check_room, manifest_of, model_table, resolve, train_spec

SMALL = ["name=run", "model={name: bincifarfbin, width: 0.0625, input_size: 16, in_channels: 1}"]


def config(data: Path, *overrides: str) -> Config:
    return load_config(None, [*SMALL, f"data.train={data}", *overrides])


def refusal(data: Path, *overrides: str) -> str:
    with pytest.raises(InvalidInputError) as caught:
        resolve(config(data, *overrides))
    return str(caught.value)


def test_the_number_of_classes_is_that_of_the_data(digits: Path) -> None:
    assert resolve(config(digits)).model.num_classes == 10


def test_the_specification_of_the_loop_says_what_the_configuration_says(digits: Path) -> None:
    resolved = resolve(
        config(digits, "binarize.bin_end=5", "train.epochs=7", "optim.max_lr=0.01", "cluster.num_workers=4")
    )
    spec = train_spec(resolved)
    net = build(**spec.model, seed=1)
    assert (net.spec.bin_end, net.spec.num_classes) == (5, 10)
    assert (spec.epochs, spec.schedule.epochs, spec.schedule.max_lr, spec.num_workers) == (7, 7, 0.01, 4)
    assert spec.data.val == str(digits)


def test_the_table_and_the_manifest_are_those_of_what_will_run(digits: Path) -> None:
    resolved = resolve(config(digits))
    assert [row.index for row in model_table(resolved).layers if row.binary_weights] == list(range(2, 8))
    assert manifest_of(resolved).split("val").num_samples == 359


def test_a_layer_beyond_the_model_is_refused(digits: Path) -> None:
    assert refusal(digits, "binarize.bin_end=99").startswith("binarize.bin_end: 99")


def test_an_unknown_model_is_refused_and_the_nearest_named(digits: Path) -> None:
    message = refusal(digits, "model.name=bincifarfbim")
    assert message.startswith("model.name: ")
    assert "bincifarfbin" in message


def test_another_number_of_classes_than_the_data_has_is_refused(digits: Path) -> None:
    message = refusal(digits, "model.num_classes=7")
    assert message.startswith(f"model.num_classes: 7, but {digits} has 10 classes.")


def test_a_missing_dataset_is_refused(digits: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(tmp_path / "none")
    assert str(tmp_path / "none") in refusal(digits, f"data.val={tmp_path / 'none'}")


def test_a_truncated_shard_is_refused_by_its_name(digits: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(digits, broken)
    shard = min(broken.rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-2048])
    assert refusal(broken).startswith(f"{shard}: ")
    shard.unlink()
    assert refusal(broken).startswith(f"{shard}: missing")


def test_validation_data_of_other_classes_is_refused(digits: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["classes"][0] = "nought"
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert refusal(digits, f"data.val={other}").startswith(
        f"data.val: {other} has 10 classes, data.train 10, or others."
    )


def test_a_disk_without_room_for_the_checkpoints_is_refused_with_both_sizes(digits: Path, tmp_path: Path) -> None:
    kept = config(digits, f"train.checkpoint.keep_last={10**9}")
    with pytest.raises(
        InvalidInputError, match=r"^storage: no room on disk: checkpoints need up to \d+ MB in .* MB are free"
    ):
        check_room(resolve(kept), tmp_path / "not" / "yet")
    check_room(resolve(config(digits)), tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [[], ["train.ema_decay=0.9"], ["binarize.weights=dab_learned"]])
def test_the_room_for_a_checkpoint_is_what_one_takes(change: list[str], digits: Path) -> None:
    resolved = resolve(config(digits, "model.width=0.5", *change))
    spec = train_spec(resolved)
    learner = Learner(spec, spec.parts[0], World.current(), None)
    for parameter in learner.net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    file = io.BytesIO()
    torch.save(learner.state(), file)
    assert checkpoint_bytes(spec) == pytest.approx(file.tell(), rel=0.02)


def test_the_room_for_a_checkpoint_is_that_of_the_largest_stage(digits: Path) -> None:
    stages = "[{name: a, epochs: 1, binarize: {weights: dab_learned}}, {name: b, epochs: 1}]"
    sizes = [
        checkpoint_bytes(train_spec(resolve(config(digits, *changes))))
        for changes in ([], ["binarize.weights=dab_learned"], [f"train.stages={stages}"])
    ]
    assert sizes[0] < sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("http://host/x", "storage: http://host/x: http:// takes no files"),
        ("gs://bucket/x", "storage: gs:// cannot be used here (Please install gcsfs"),
        ("s3://KEY:hidden@bucket/x", "storage: s3://bucket/x: holds a user name, a password"),
    ],
)
def test_a_url_that_keeps_no_runs_is_refused_as_storage(digits: Path, place: str, message: str) -> None:
    assert refusal(digits, f"storage={place}").startswith(message)


def test_storage_behind_a_url_is_tried_before_anything_is_created(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        check_room(resolve(config(digits, "storage=s3://bucket/x")), "s3://bucket/x")
        with pytest.raises(DabError, match=r"^storage: s3://none/x: there is no such bucket"):
            check_room(resolve(config(digits)), "s3://none/x")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
        with pytest.raises(DabError, match=r"^storage: s3://bucket/x: the store refuses"):
            check_room(resolve(config(digits)), "s3://bucket/x")
        assert server.names() == []


def test_storage_at_a_file_url_is_a_folder(digits: Path, tmp_path: Path) -> None:
    assert resolve_paths(config(digits, f"storage={tmp_path.as_uri()}")).storage == str(tmp_path)


def test_data_behind_a_url_resolves_like_the_folder(digits: Path, tmp_path: Path) -> None:
    with RangeServer(digits, tmp_path) as server:
        over_http = resolve(resolve_paths(config(digits, f"data.train={server.url}/"), tmp_path))
        assert manifest_of(over_http).digest == manifest_of(config(digits)).digest
        assert train_spec(over_http).data.train == train_spec(over_http).data.val == f"{server.url}/"
        assert over_http.model.num_classes == 10
        assert server.requests(".tar") == []


def test_a_data_set_that_was_not_uploaded_is_named(digits: Path, tmp_path: Path) -> None:
    with RangeServer(tmp_path, tmp_path) as server:
        assert refusal(digits, f"data.train={server.url}/x").startswith(f"{server.url}/x: no manifest.json")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://host/x", "ftp://host/x: ftp:// is not read; use one of file, http, https, s3"),
        ("https://me:secret@host/x", "https://host/x: holds a user name or password"),
        ("https://host/x?X-Amz-Signature=secret", "https://host/x?*** has a part after the path"),
    ],
)
@pytest.mark.parametrize("field", ["data.train", "data.val"])
def test_a_url_that_cannot_be_read_or_holds_a_secret_is_refused(
    field: str, place: str, message: str, digits: Path
) -> None:
    found = refusal(digits, f"{field}={place}")
    assert found.startswith(f"{field}: {message}")
    assert "secret" not in found
