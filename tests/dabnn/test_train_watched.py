"""The training loop as its instruments, its agreement of ranks and its diagnosis see it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import ROOT, small_spec

from dabnn.distributed import World
from dabnn.layers import BinaryConv2d
from dabnn.models import build
from dabnn.run_folder import RunFolder
from dabnn.spec import OptimSpec, TrainSpec
from dabnn.train import train

BEGINNING = """
import gc, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from dabnn.distributed import World
from dabnn.layers import BinaryConv2d
from dabnn.run_folder import RunFolder
from dabnn.spec import TrainSpec
from dabnn.train import train

passes = 0
"""
# As `dabnn.train` ends: gloo threads of a group that is still referred to abort Python's exit at times.
END = """
def run(spec, folder):
    world = World.current()
    if world.rank == 1:
        torch.nn.modules.module.register_module_forward_pre_hook(alter)
    result = train(TrainSpec.from_file(Path(spec)), RunFolder(Path(folder)), world=world)
    Path(folder, f"rank-{world.rank}.json").write_text(json.dumps([result.status, result.message]))

dist.init_process_group("gloo")
run(sys.argv[1], sys.argv[2])
gc.collect()
dist.destroy_process_group()
"""
# On rank 1 a hook of torch's own alters one weight of one layer in step 6; two passes before settle DDP.
ALTERED = (
    BEGINNING
    + """
def alter(layer, inputs):
    global passes
    if isinstance(layer, BinaryConv2d) and layer.training and layer is first(layer):
        passes += 1
        if passes == 9:
            with torch.no_grad():
                layer.weight.view(-1)[3] *= -1

def first(layer, seen=[]):
    seen or seen.append(layer)
    return seen[0]
"""
    + END
)
# On rank 1 the images of step 6 hold a value that is not a number.
SPOILED = (
    BEGINNING
    + """
def alter(module, inputs):
    global passes
    if type(module).__name__ == "Network" and module.training:
        passes += 1
        if passes >= 9:
            inputs[0][2, 0, 4, 4] = torch.nan
"""
    + END
)
LAYER_KEYS = {"flipped_share", "upper_share", "gap", "offset", "weight_error", "positive_inputs", "dead_filters"}


def run_program(program: str, spec: TrainSpec, folder: Path) -> list[Any]:
    """Run a program on two ranks and return [status, message], equal on both."""
    (folder / "program.py").write_text(program)
    (folder / "spec.json").write_text(json.dumps(spec.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(folder / "program.py"), str(folder / "spec.json"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends: list[list[Any]] = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1]
    return ends[0]


def layers(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key.startswith("layers/")}


def test_every_epoch_of_a_run_has_the_instruments_of_its_layers(digits: Path, tmp_path: Path) -> None:
    result = train(small_spec(digits), RunFolder(tmp_path), world=World.current())
    net = build(**small_spec(digits).model)
    numbers = [
        number
        for number, conv in enumerate((m for m in net.modules() if isinstance(m, torch.nn.Conv2d)), start=1)
        if isinstance(conv, BinaryConv2d)
    ]
    for line in RunFolder(tmp_path).metrics():
        assert {f"layers/{number:02d}/{key}" for number in numbers for key in LAYER_KEYS} <= set(line["metrics"])
    flipped = [value for key, value in result.metrics.items() if key.endswith("/flipped_share")]
    assert 0 < max(flipped) < 0.2
    assert 0.1 < result.metrics["layers/02/positive_inputs"] < 0.9


def test_a_run_without_instruments_ends_with_the_same_weights(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits, epochs=1)
    watched = train(spec, RunFolder(tmp_path / "on"), world=World.current())
    plain = train(replace(spec, instruments=False), RunFolder(tmp_path / "off"), world=World.current())
    assert plain.weights_sha256 == watched.weights_sha256
    assert layers(watched.metrics)
    assert not layers(plain.metrics)


def test_a_weight_altered_on_one_rank_ends_the_run_on_all_and_names_the_layer(digits: Path, tmp_path: Path) -> None:
    status, message = run_program(ALTERED, small_spec(digits, num_workers=2), tmp_path)
    assert status == "failed"
    assert message.startswith("the ranks hold different bits (epoch 1, step 7). layer 2 (")
    assert "other bits on rank 0 than on rank 1" in message
    assert "`dab resume`" in message
    assert RunFolder(tmp_path).result()["status"] == "failed"


def test_a_loss_that_is_not_finite_ends_all_ranks_and_leaves_the_step_to_inspect(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits, num_workers=2)
    status, message = run_program(SPOILED, spec, tmp_path)
    assert status == "failed"
    assert message.startswith("the loss or its gradient is not finite (epoch 1, step 7). rank 1: loss ")
    assert "; layer 1 (conv1): its input holds 1 NaN of " in message
    folder = RunFolder(tmp_path)
    assert [file.name for file in folder.inspect.iterdir()] == ["step-00000007-rank-1.pt"]
    assert str(folder.inspect / "step-00000007-rank-1.pt") in message
    state = torch.load(folder.inspect / "step-00000007-rank-1.pt", weights_only=True)
    assert all(tensor.isfinite().all() for name, tensor in state["net"].items() if "running" not in name)
    assert len(state["images"]) == len(state["labels"]) == len(state["indices"]) == 48
    assert (state["rank"], state["epoch"], state["step"], state["seed"]) == (1, 1, 7, spec.seed)


@pytest.mark.parametrize(("name", "optimizer", "max_lr"), [("bincifarfbin", "adam", 1e36), ("bincifar", "sgd", 1e4)])
def test_a_run_that_diverges_names_the_layer(
    name: str, optimizer: str, max_lr: float, digits: Path, tmp_path: Path
) -> None:
    spec = small_spec(digits, optim=OptimSpec(optimizer))
    schedule = replace(spec.schedule, name="constant", max_lr=max_lr)
    diverging = replace(spec, model=spec.model | {"name": name}, schedule=schedule)
    result = train(diverging, RunFolder(tmp_path), world=World.current())
    assert result.status == "failed"
    assert re.search(r"rank 0: loss \S+; [\w ().]+: its [\w' ]+ holds \d+", result.message), result.message
    assert len(list(RunFolder(tmp_path).inspect.iterdir())) == 1
