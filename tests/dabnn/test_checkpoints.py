from pathlib import Path

import pytest
import torch

from dabnn.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    Moment,
    best_checkpoint,
    kept,
    list_checkpoints,
    load_state,
    restore_point,
)
from dabnn.errors import DabError, InvalidInputError
from dabnn.spec import CheckpointPolicy


def write(folder: Path, steps: dict[int, float], policy: CheckpointPolicy) -> None:
    writer = CheckpointWriter(folder, policy)
    for step, score in steps.items():
        writer.save({"value": torch.full((4,), float(step))}, Moment(step, step), {"val_top1": score})
    writer.wait()


def test_newest_and_best_are_kept_and_the_rest_removed(tmp_path: Path) -> None:
    write(tmp_path, {1: 50.0, 2: 90.0, 3: 60.0, 4: 70.0, 5: 65.0}, CheckpointPolicy(keep_last=2, keep_best=1))
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert best_checkpoint(tmp_path).step == 2
    assert {path.stem for path in tmp_path.glob("*.pt")} == {f"step-{step:08d}" for step in (2, 4, 5)}


def test_checkpoint_in_mid_epoch_never_counts_as_best() -> None:
    middle = Checkpoint("a", 1, 0, {}, "", 1)
    scored = Checkpoint("b", 2, 1, {"val_top1": 10.0}, "", 1)
    newest = Checkpoint("c", 3, 1, {}, "", 1)
    assert kept([middle, scored, newest], CheckpointPolicy(keep_last=1, keep_best=1)) == [scored, newest]


def test_file_without_commit_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, {1: 1.0}, CheckpointPolicy())
    (tmp_path / "step-00000009.pt").write_bytes(b"half of it")
    found = restore_point(tmp_path)
    assert found is not None
    assert found.step == 1


def test_damaged_checkpoints_are_set_aside_so_that_retention_keeps_good_ones(tmp_path: Path) -> None:
    write(tmp_path, {1: 1.0, 2: 2.0}, CheckpointPolicy(keep_last=2, keep_best=0))
    Path(list_checkpoints(tmp_path)[-1].path).write_bytes(b"damaged")
    found = restore_point(tmp_path)
    assert found is not None
    assert found.step == 1
    writer = CheckpointWriter(tmp_path, CheckpointPolicy(keep_last=1, keep_best=0))
    writer.save({}, Moment(3, 3), {})
    writer.wait()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [3]
    assert (tmp_path / "step-00000002.pt.damaged").exists()


def save(folder: Path, step: int, value: float, metrics: dict[str, float]) -> None:
    writer = CheckpointWriter(folder, CheckpointPolicy(keep_last=1, keep_best=0))
    writer.save({"net": {"value": torch.full((4,), value)}, "model": {}}, Moment(step, 1), metrics)
    writer.wait()


def test_a_step_that_is_saved_again_overwrites_nothing_before_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 7, 1.0, {})
    with monkeypatch.context() as killed:
        killed.setattr("dabnn.checkpoints.write_json", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 7, 2.0, {"val_top1": 50.0})
    found = restore_point(tmp_path)
    assert found is not None
    assert load_state(found.path)["net"]["value"][0] == 1
    for value in (2.0, 3.0):
        save(tmp_path, 7, value, {"val_top1": 50.0})
        (found,) = list_checkpoints(tmp_path)
        assert (found.metrics, load_state(found.path)["net"]["value"][0]) == ({"val_top1": 50.0}, value)
        assert {path.name for path in tmp_path.iterdir()} == {"step-00000007.json", found.name}
    save(tmp_path, 8, 4.0, {})
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000008.json", "step-00000008.pt"}


def test_data_that_a_kill_left_beside_its_successor_goes_with_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, 7, 1.0, {})
    first = (tmp_path / "step-00000007.pt").read_bytes()
    save(tmp_path, 7, 2.0, {})
    (tmp_path / "step-00000007.pt").write_bytes(first)
    found = restore_point(tmp_path)
    assert found is not None
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000007.json", found.name}


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_data_that_differs_from_its_commit_is_not_loaded(value: float, tmp_path: Path) -> None:
    save(tmp_path, 7, 0.0, {})
    save(tmp_path, 7, value, {})
    path = Path(list_checkpoints(tmp_path)[0].path)
    save(tmp_path / "other", 7, 9.0, {})
    (tmp_path / "other" / "step-00000007.pt").replace(path)
    with pytest.raises(DabError, match=rf"{path.name}: damaged \(its checksum is not that of step-00000007\.json\)"):
        load_state(path)


def test_torn_commit_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {1: 1.0}, CheckpointPolicy())
    (tmp_path / "step-00000002.json").write_text("")
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1]


def test_saved_state_is_a_copy_of_the_moment(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointPolicy())
    weights = torch.zeros(1000)
    writer.save({"net": {"weights": weights}, "model": {}}, Moment(1, 1), {})
    weights += 1
    writer.wait()
    assert load_state(list_checkpoints(tmp_path)[0].path)["net"]["weights"].sum() == 0


def test_a_disk_without_room_is_told_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    write(tmp_path, {1: 1.0}, CheckpointPolicy())
    writer = CheckpointWriter(tmp_path, CheckpointPolicy())
    tmp_path.joinpath("step-00000002.tmp").symlink_to("/dev/full")
    writer.save({"value": torch.zeros(100_000)}, Moment(2, 2), {})
    with pytest.raises(DabError, match="no room on disk"):
        writer.wait()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1]
    assert restore_point(tmp_path) is not None


def test_missing_or_foreign_file_is_refused_with_its_name(tmp_path: Path) -> None:
    foreign = tmp_path / "x.pt"
    foreign.write_bytes(b"not a checkpoint")
    for path in (foreign, tmp_path / "absent.pt"):
        with pytest.raises(InvalidInputError, match=path.name):
            load_state(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"net": {}, "images": torch.ones(1)}, "it holds net, images and no model"),
        ({"conv1.weight": torch.ones(1), "bn1.weight": torch.ones(1)}, "it holds conv1.weight, bn1.weight and no net"),
        ({f"conv{number}.weight": 0 for number in range(300)}, "it holds conv0.weight, .*, ... and no net"),
        ({}, "it holds nothing"),
        (torch.ones(3), "it holds a Tensor"),
        ([torch.ones(3)], "it holds a list"),
    ],
)
def test_a_file_of_something_else_is_refused_by_what_it_holds(content: object, expected: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InvalidInputError, match=rf"x\.pt: no checkpoint of a run: {expected}") as caught:
        load_state(tmp_path / "x.pt")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_best_of_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="at least one epoch"):
        best_checkpoint(tmp_path)
