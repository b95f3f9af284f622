import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import kill_in_mid_epoch, small_spec, start_torchrun, torchrun

from dabnn.checkpoints import best_checkpoint, list_checkpoints, load_state
from dabnn.distributed import World
from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder
from dabnn.spec import CheckpointPolicy, OptimSpec, TrainSpec
from dabnn.train import TrainResult, Verdict, train, verdict


def run(spec: TrainSpec, folder: Path) -> TrainResult:
    return train(spec, RunFolder(folder), world=World.current())


class StopAfter:
    """Asks for a stop once `epoch` epochs are finished, as `dab stop` would."""

    def __init__(self, folder: RunFolder, epoch: int) -> None:
        self.folder, self.epoch = folder, epoch

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        if epoch == self.epoch:
            self.folder.request_stop()


def test_same_specification_gives_bit_identical_weights(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits)
    first, second = run(spec, tmp_path / "a"), run(spec, tmp_path / "b")
    assert first.weights_sha256 == second.weights_sha256
    assert first.status == "finished"
    assert first.metrics["val_top1"] == second.metrics["val_top1"]


def test_another_seed_gives_other_weights(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits, epochs=1)
    assert run(spec, tmp_path / "a").weights_sha256 != run(replace(spec, seed=4), tmp_path / "b").weights_sha256


def test_training_learns_the_digits(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits, epochs=3)
    model = spec.model | {"name": "bincifar", "width": 0.125, "bin_start": 2, "bin_end": 7}
    wide = replace(spec, model=model, schedule=replace(spec.schedule, epochs=3))
    result = run(wide, tmp_path)
    assert result.metrics["val_top1"] > 60  # chance is 10
    lines = RunFolder(tmp_path).metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["metrics"]["train_loss"] < lines[0]["metrics"]["train_loss"]


def test_stop_takes_a_checkpoint_and_the_next_attempt_ends_as_if_never_stopped(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits, checkpoint=CheckpointPolicy(every_steps=None))
    whole = run(spec, tmp_path / "whole")
    folder = RunFolder(tmp_path / "stopped")
    stopped = train(spec, folder, world=World.current(), observer=StopAfter(folder, 1))
    assert (stopped.status, stopped.epoch) == ("stopped", 1)
    folder.clear_stop()
    resumed = train(spec, folder, world=World.current())
    assert resumed.status == "finished"
    assert resumed.weights_sha256 == whole.weights_sha256
    assert [attempt["start_step"] for attempt in folder.attempts()] == [0, stopped.step]


class StopAtStep(RunFolder):
    """A run folder in which a stop is asked for while step number `at` is taken."""

    at = 0

    def is_stop_requested(self) -> bool:
        commits = self.root.glob("checkpoints/*.json")
        return self.at > 0 and (self.progress().get("step", 0) >= self.at or any(commits))


def test_stop_in_the_last_step_of_an_epoch_takes_a_checkpoint_with_its_score(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dabnn.progress.INTERVAL_S", 0.0)
    spec = small_spec(digits, checkpoint=CheckpointPolicy(every_epochs=2))
    whole = run(spec, tmp_path / "whole")
    folder = StopAtStep(tmp_path / "stopped")
    monkeypatch.setattr(StopAtStep, "at", whole.step // 2)
    stopped = train(spec, folder, world=World.current())
    assert (stopped.status, stopped.epoch, stopped.step) == ("stopped", 1, whole.step // 2)
    assert best_checkpoint(folder.checkpoints).score == stopped.metrics["val_top1"]
    monkeypatch.setattr(StopAtStep, "at", 0)
    assert train(spec, folder, world=World.current()).weights_sha256 == whole.weights_sha256


def test_stop_between_epochs_leaves_the_score_of_the_checkpoint(digits: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    stopped = train(small_spec(digits), folder, world=World.current(), observer=StopAfter(folder, 1))
    assert best_checkpoint(folder.checkpoints).score == stopped.metrics["val_top1"]


def measured(metrics: dict[str, float]) -> dict[str, float]:
    """The instruments of the layers."""
    return {key: value for key, value in metrics.items() if key.startswith("layers/")}


@pytest.mark.parametrize("num_workers", [2, 3])
def test_killed_in_mid_epoch_it_resumes_to_bit_identical_weights(
    num_workers: int, digits: Path, tmp_path: Path
) -> None:
    spec = small_spec(digits, num_workers=num_workers)
    # Of the 359 samples of the validation some ranks have a batch more than others.
    spec = replace(spec, data=replace(spec.data, eval_batch_size=359 // num_workers))
    whole = torchrun(spec, tmp_path / "whole", num_workers)
    kill_in_mid_epoch(spec, tmp_path / "killed", num_workers)
    resumed = torchrun(spec, tmp_path / "killed", num_workers)
    assert RunFolder(tmp_path / "killed").attempts()[-1]["start_step"] > 0
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["metrics"]["train_loss"] == whole["metrics"]["train_loss"]
    assert measured(resumed["metrics"]) == measured(whole["metrics"]) != {}


def test_a_finished_run_started_again_ends_at_once_with_the_same_weights(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits, epochs=1)
    first, again = run(spec, tmp_path), run(spec, tmp_path)
    assert again.weights_sha256 == first.weights_sha256
    assert again.metrics["val_top1"] == first.metrics["val_top1"]


def test_a_loss_that_is_not_finite_fails_the_run_and_names_the_place(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits)
    diverging = replace(spec, schedule=replace(spec.schedule, name="constant", max_lr=1e36))
    result = run(diverging, tmp_path)
    assert result.status == "failed"
    assert "rank 0: loss" in result.message
    assert "epoch 1" in result.message
    assert "optim.max_lr" in result.message


@pytest.mark.parametrize(
    ("name", "optimizer", "max_lr"), [("bincifarfbin", "adam", 1e36), ("bincifar", "sgd", 1e4), ("bincifar", "sgd", 10)]
)
def test_weights_that_are_not_finite_are_never_saved(
    name: str, optimizer: str, max_lr: float, digits: Path, tmp_path: Path
) -> None:
    spec = small_spec(digits, checkpoint=CheckpointPolicy(every_steps=1, keep_last=1), optim=OptimSpec(optimizer))
    schedule = replace(spec.schedule, name="constant", max_lr=max_lr)
    result = run(replace(spec, model=spec.model | {"name": name}, schedule=schedule), tmp_path)
    assert result.status == "failed"
    assert "not finite" in result.message
    for checkpoint in list_checkpoints(RunFolder(tmp_path).checkpoints):
        assert all(tensor.isfinite().all() for tensor in load_state(checkpoint.path)["net"].values())


def test_resuming_with_other_data_is_refused(digits: Path, small_digits: Path, tmp_path: Path) -> None:
    first = run(small_spec(digits, epochs=1), tmp_path)
    result = run(small_spec(small_digits, epochs=2), tmp_path)
    assert result.status == "failed"
    assert re.match(r"rank 0: data\.train: .* has other samples", result.message)
    assert (result.epoch, result.step) == (first.epoch, first.step)
    assert list_checkpoints(RunFolder(tmp_path).checkpoints)[-1].step == first.step


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits, epochs=1)
    whole = run(spec, tmp_path / "whole")
    run(spec, tmp_path / "damaged")
    newest = Path(list_checkpoints(RunFolder(tmp_path / "damaged").checkpoints)[-1].path)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    again = run(spec, tmp_path / "damaged")
    assert RunFolder(tmp_path / "damaged").attempts()[-1]["start_step"] < whole.step
    assert again.weights_sha256 == whole.weights_sha256


def test_init_from_starts_with_the_weights_of_another_run(digits: Path, tmp_path: Path) -> None:
    run(small_spec(digits, epochs=1), tmp_path / "a")
    source = best_checkpoint(RunFolder(tmp_path / "a").checkpoints)
    spec = small_spec(digits, epochs=1, init_from=source.path)
    frozen = replace(spec, schedule=replace(spec.schedule, name="constant", max_lr=1e-30, min_lr=0.0))
    run(frozen, tmp_path / "b")
    before = load_state(source.path)["net"]["conv2.weight"]
    after = load_state(best_checkpoint(RunFolder(tmp_path / "b").checkpoints).path)["net"]["conv2.weight"]
    assert torch.equal(before, after)


def damage_one_image(digits: Path, target: Path, split: str = "train") -> str:
    """Copy the dataset and overwrite the pixels of one image; return the name of its shard."""
    shutil.copytree(digits, target)
    shard = min(target.glob(f"{split}-*.tar"))
    content = bytearray(shard.read_bytes())
    start = content.index(b"IDAT")
    content[start : start + 40] = bytes(40)
    shard.write_bytes(content)
    return shard.name


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_sample_that_does_not_decode_fails_the_run_and_names_its_shard(
    split: str, digits: Path, tmp_path: Path
) -> None:
    name = damage_one_image(digits, tmp_path / "data", split)
    result = run(small_spec(tmp_path / "data"), tmp_path / "run")
    assert result.status == "failed"
    assert name in result.message
    assert "does not decode" in result.message


def test_one_rank_with_a_damaged_sample_ends_all_ranks(digits: Path, tmp_path: Path) -> None:
    name = damage_one_image(digits, tmp_path / "data")
    process = start_torchrun(small_spec(tmp_path / "data", num_workers=2), tmp_path / "run", 2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert name in output
    assert RunFolder(tmp_path / "run").result()["status"] == "failed"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((0, 0, 0), Verdict.CONTINUE),
        ((1, 0, 0), Verdict.STOP),
        ((1, 1, 0), Verdict.RANK_ERROR),
        ((1, 0, 1), Verdict.NOT_FINITE),
        ((0, 1, 1), Verdict.RANK_ERROR),
    ],
)
def test_verdict_puts_errors_before_a_stop(flags: tuple[int, int, int], expected: Verdict) -> None:
    decision, reason = verdict(*flags)
    assert decision is expected
    assert bool(reason) == (expected is not Verdict.CONTINUE)


def test_specification_survives_json(digits: Path) -> None:
    spec = small_spec(digits)
    assert TrainSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(InvalidInputError, match="epoch_count"):
        TrainSpec.from_dict(spec.to_dict() | {"epoch_count": 3})


def test_metrics_hold_counts_that_do_not_depend_on_the_batch_size(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits, epochs=1)
    result = run(spec, tmp_path / "a")
    other = run(replace(spec, data=replace(spec.data, eval_batch_size=37)), tmp_path / "b")
    assert result.metrics["val_top1"] == other.metrics["val_top1"]
    assert math.isclose(result.metrics["val_loss"], other.metrics["val_loss"], rel_tol=1e-5)
