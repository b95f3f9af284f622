"""Runs in stages, and the recipes of a stage, in the real loop on a few digits: a second or two each."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import kill_in_mid_epoch, small_spec, torchrun

from dabnn.checkpoints import best_checkpoint, list_checkpoints, load_state, stage_end
from dabnn.distributed import World
from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder
from dabnn.schedules import Schedule
from dabnn.spec import CheckpointPolicy, DistillSpec, KurtosisSpec, LossSpec, OptimSpec, StageSpec, TrainSpec
from dabnn.train import TrainResult, train
from dabnn.transfer import load_trained

FLOAT = {"inputs": "none", "layers": []}


def few_digits(data: Path, **changes: Any) -> TrainSpec:
    spec = small_spec(data, epochs=1, checkpoint=CheckpointPolicy(), **changes)
    return replace(spec, data=replace(spec.data, batch_size=60), schedule=replace(spec.schedule, epochs=1))


def in_stages(spec: TrainSpec, *parts: tuple[str, dict[str, Any], LossSpec], epochs: int = 2) -> TrainSpec:
    schedule = Schedule("cosine", max_lr=3e-3, epochs=epochs)
    stages = tuple(
        StageSpec(name, epochs, spec.model | model, schedule, OptimSpec(), loss) for name, model, loss in parts
    )
    return replace(spec, model=stages[-1].model, stages=stages, epochs=epochs * len(stages))


def four_stages(data: Path, **changes: Any) -> TrainSpec:
    """Float, binary inputs, binary weights, both; the last learns from the first."""
    distill = LossSpec(distill=DistillSpec("stage:float"))
    return in_stages(
        few_digits(data, **changes),
        ("float", FLOAT, LossSpec()),
        ("inputs", {"layers": []}, LossSpec()),
        ("weights", {"inputs": "none"}, LossSpec()),
        ("both", {"weights": "dab_learned"}, distill),
        epochs=1,
    )


def run(spec: TrainSpec, folder: Path, observer: Any = None) -> TrainResult:
    return train(spec, RunFolder(folder), world=World.current(), observer=observer)


def weights_of(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return dict(load_state(stage_end(RunFolder(folder), number).path)["net"])


class StopAfter:
    def __init__(self, folder: RunFolder, epoch: int) -> None:
        self.folder, self.epoch = folder, epoch

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        if epoch == self.epoch:
            self.folder.request_stop()


def test_stages_are_one_run_whose_epochs_are_counted_through(small_digits: Path, tmp_path: Path) -> None:
    result = run(four_stages(small_digits), tmp_path)
    assert (result.status, result.epoch) == ("finished", 4), result.message
    lines = RunFolder(tmp_path).metrics()
    assert [(line["step"], line["metrics"]["stage"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    position = load_state(list_checkpoints(RunFolder(tmp_path).checkpoints)[-1].path)["position"]
    assert (position["stage"], position["epoch"], position["step"]) == (3, 4, result.step)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_run_stopped_at_a_boundary_ends_as_if_never_stopped(
    stop_after: int, small_digits: Path, tmp_path: Path
) -> None:
    spec = four_stages(small_digits)
    whole = run(spec, tmp_path / "whole")
    folder = RunFolder(tmp_path / "stopped")
    stopped = run(spec, folder.root, StopAfter(folder, stop_after))
    assert (stopped.status, stopped.epoch) == ("stopped", stop_after)
    folder.clear_stop()
    assert run(spec, folder.root).weights_sha256 == whole.weights_sha256


def test_two_ranks_killed_within_a_later_stage_end_with_the_same_weights(small_digits: Path, tmp_path: Path) -> None:
    policy = CheckpointPolicy(every_steps=7)  # of 4 steps an epoch: within the second of the two stages
    recipe = LossSpec(0.1, KurtosisSpec(0.1), DistillSpec("stage:float"))
    spec = in_stages(
        few_digits(small_digits, num_workers=2), ("float", FLOAT, LossSpec()), ("both", {}, recipe), epochs=1
    )
    spec = replace(spec, checkpoint=policy, ema_decay=0.9, sync_bn=True)
    spec = replace(spec, stages=(spec.stages[0], replace(spec.stages[1], epochs=4)), epochs=5)
    whole = torchrun(spec, tmp_path / "whole", 2)
    kill_in_mid_epoch(spec, tmp_path / "killed", 2)
    resumed = torchrun(spec, tmp_path / "killed", 2)
    assert RunFolder(tmp_path / "killed").attempts()[-1]["start_step"] > 4
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def frozen(stage: StageSpec) -> StageSpec:
    return replace(stage, schedule=Schedule("constant", max_lr=1e-30, epochs=stage.epochs))


def test_a_stage_starts_with_the_weights_of_the_one_before(small_digits: Path, tmp_path: Path) -> None:
    spec = four_stages(small_digits)
    spec = replace(spec, stages=(spec.stages[0], *map(frozen, spec.stages[1:])))
    run(spec, tmp_path)
    first, last = weights_of(tmp_path, 1), weights_of(tmp_path, 4)
    assert torch.equal(first["conv3.weight"], last["conv3.weight"])
    assert not torch.equal(first["bn3.running_mean"], last["bn3.running_mean"])


def test_only_the_last_stage_has_a_best_checkpoint(small_digits: Path, tmp_path: Path) -> None:
    # The float stage learns, the binary one hardly: by its score the float network would win.
    spec = in_stages(few_digits(small_digits), ("float", FLOAT, LossSpec()), ("both", {}, LossSpec()), epochs=6)
    spec = replace(spec, stages=(spec.stages[0], frozen(replace(spec.stages[1], epochs=1))), epochs=7)
    folder = RunFolder(tmp_path)
    run(spec, folder.root)
    checkpoints = list_checkpoints(folder.checkpoints)
    best = best_checkpoint(folder.checkpoints)
    assert max(entry.metrics["val_top1"] for entry in checkpoints) > best.metrics["val_top1"]
    assert (best.stage, best.epoch) == (2, 7)
    assert load_trained(best.path).spec.layers is None, "not the float network, which names no layers"


def test_before_the_last_stage_there_is_nothing_to_deliver(small_digits: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    run(four_stages(small_digits), folder.root, StopAfter(folder, 2))
    with pytest.raises(InvalidInputError, match="the newest is of stage 2 of 4"):
        best_checkpoint(folder.checkpoints)


def test_the_end_of_each_stage_is_kept(small_digits: Path, tmp_path: Path) -> None:
    policy = CheckpointPolicy(keep_last=1, keep_best=0)
    run(replace(four_stages(small_digits), checkpoint=policy), tmp_path)
    found = list_checkpoints(RunFolder(tmp_path).checkpoints)
    assert [(entry.stage, entry.ends_stage) for entry in found] == [(1, True), (2, True), (3, True), (4, True)]


def test_resuming_with_another_architecture_is_a_clear_failure(small_digits: Path, tmp_path: Path) -> None:
    spec = few_digits(small_digits)
    run(spec, tmp_path)
    wider = replace(spec, model=spec.model | {"width": 0.125}, epochs=2)
    result = run(wider, tmp_path)
    assert result.status == "failed"
    assert "was saved with width=0.0625, the run now has 0.125" in result.message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"precision": "fp8"}, "train.precision: 'fp8' is not known"),
        ({"loss": LossSpec(distill=DistillSpec("nowhere.pt"))}, "nowhere.pt: cannot be read"),
        ({"loss": LossSpec(distill=DistillSpec("stage:float"))}, "stage:float is none of the earlier stages"),
        ({"init_from": "nowhere.pt"}, "nowhere.pt: cannot be read"),
    ],
)
def test_a_recipe_that_cannot_be_is_a_failure_before_the_first_step(
    change: dict[str, Any], expected: str, small_digits: Path, tmp_path: Path
) -> None:
    result = run(replace(few_digits(small_digits), **change), tmp_path)
    assert (result.status, result.step) == ("failed", 0)
    assert expected in result.message


def test_a_teacher_of_other_classes_and_foreign_weights_are_refused(small_digits: Path, tmp_path: Path) -> None:
    spec = few_digits(small_digits)
    run(spec, tmp_path / "source")
    path = best_checkpoint(RunFolder(tmp_path / "source").checkpoints).path
    larger = replace(spec, model=spec.model | {"input_size": 32})
    taught = run(replace(larger, loss=LossSpec(distill=DistillSpec(path))), tmp_path / "taught")
    assert f"{path} has input_size=16, the network that learns from it 32" in taught.message
    wider = replace(spec, model=spec.model | {"width": 0.125}, init_from=path)
    started = run(wider, tmp_path / "started")
    assert f"train.init_from: {path}: holds another architecture: conv1.weight" in started.message


def test_a_float_run_is_where_a_binary_run_may_start(small_digits: Path, tmp_path: Path) -> None:
    spec = few_digits(small_digits)
    run(replace(spec, model=spec.model | FLOAT), tmp_path / "float")
    path = best_checkpoint(RunFolder(tmp_path / "float").checkpoints).path
    schedule = Schedule("constant", max_lr=1e-30, epochs=1)
    run(replace(spec, init_from=path, schedule=schedule), tmp_path / "binary")
    binary = load_state(best_checkpoint(RunFolder(tmp_path / "binary").checkpoints).path)["net"]
    assert torch.equal(load_state(path)["net"]["conv5.weight"], binary["conv5.weight"])


@pytest.mark.parametrize(
    "change",
    [
        {"loss": LossSpec(label_smoothing=0.2)},
        {"loss": LossSpec(kurtosis=KurtosisSpec(1.0))},
        {"precision": "bf16"},
        {"optim": OptimSpec("adamw", weight_decay=0.1)},
    ],
    ids=["smoothing", "kurtosis", "bf16", "decay"],
)
def test_each_recipe_changes_the_weights_that_a_run_ends_with(
    change: dict[str, Any], small_digits: Path, tmp_path: Path
) -> None:
    spec = few_digits(small_digits)
    plain, other = run(spec, tmp_path / "plain"), run(replace(spec, **change), tmp_path / "other")
    assert (plain.status, other.status) == ("finished", "finished"), other.message
    assert plain.weights_sha256 != other.weights_sha256


def test_bf16_keeps_latent_weights_and_the_optimizer_in_float32(small_digits: Path, tmp_path: Path) -> None:
    run(replace(few_digits(small_digits), precision="bf16"), tmp_path)
    state = load_state(best_checkpoint(RunFolder(tmp_path).checkpoints).path)
    moments = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    tensors = [tensor for tensor in [*state["net"].values(), *moments] if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_the_kurtosis_penalty_brings_latent_weights_closer_to_its_target(small_digits: Path, tmp_path: Path) -> None:
    def distance(loss: LossSpec, folder: Path) -> float:
        run(replace(few_digits(small_digits), loss=loss), folder)
        weight = load_state(best_checkpoint(RunFolder(folder).checkpoints).path)["net"]["conv4.weight"]
        centered = weight - weight.mean()
        return abs(float((centered**4).mean() / centered.var(correction=0) ** 2) - 1.8)

    assert distance(LossSpec(kurtosis=KurtosisSpec(10.0)), tmp_path / "a") < distance(LossSpec(), tmp_path / "b") - 0.05


def test_the_average_is_validated_saved_for_export_and_resumed(small_digits: Path, tmp_path: Path) -> None:
    spec = replace(few_digits(small_digits), epochs=3, ema_decay=0.8, checkpoint=CheckpointPolicy(every_steps=3))
    whole = run(spec, tmp_path / "whole")
    state = load_state(best_checkpoint(RunFolder(tmp_path / "whole").checkpoints).path)
    assert not torch.equal(state["net"]["conv3.weight"], state["latest"]["conv3.weight"])
    folder = RunFolder(tmp_path / "stopped")
    run(spec, folder.root, StopAfter(folder, 1))
    folder.clear_stop()
    resumed = run(spec, folder.root)
    assert resumed.weights_sha256 == whole.weights_sha256
    assert resumed.metrics["val_loss"] == whole.metrics["val_loss"]


def test_an_average_that_was_not_saved_cannot_be_resumed(small_digits: Path, tmp_path: Path) -> None:
    spec = few_digits(small_digits)
    run(spec, tmp_path)
    result = run(replace(spec, epochs=2, ema_decay=0.9), tmp_path)
    assert "was saved with no average of weights, the run now has train.ema_decay=0.9" in result.message


def test_another_number_of_parameter_groups_is_refused_with_the_name_of_the_checkpoint(
    small_digits: Path, tmp_path: Path
) -> None:
    spec = few_digits(small_digits)
    run(spec, tmp_path)
    result = run(replace(spec, epochs=2, optim=OptimSpec(decay_all=True)), tmp_path)
    assert result.status == "failed"
    assert re.search(r"step-\d+\.pt: its optimizer does not fit the run.*train\.init_from", result.message)


def test_a_rate_beyond_float32_fails_the_run_with_advice(small_digits: Path, tmp_path: Path) -> None:
    spec = replace(few_digits(small_digits), schedule=Schedule("constant", max_lr=1e38, epochs=1))
    result = run(spec, tmp_path)
    assert result.status == "failed"
    assert "not finite" in result.message
    assert "Lower optim.max_lr" in result.message


def test_stages_that_do_not_add_up_are_refused(small_digits: Path) -> None:
    spec = four_stages(small_digits)
    with pytest.raises(InvalidInputError, match=r"^train\.epochs: 7, but the stages take 4 epochs"):
        replace(spec, epochs=7)


def test_a_specification_with_stages_survives_json(small_digits: Path) -> None:
    spec = four_stages(small_digits)
    assert TrainSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
