"""`dab sensitivity` on a binary run and its float twin, both trained for a moment on real digits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from program import Dab, finish, wait_until

from orchestrator import tracking
from orchestrator.plan_file import load_plan

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

CONFIG = """
name: signs
model: {name: bincifarfbin, input_size: 16, in_channels: 1, width: 0.0625}
data: {train: digits, batch_size: 32, eval_batch_size: 128, num_loaders: 0}
optim: {name: adam, max_lr: 2e-3}
schedule: {name: cosine}
train: {epochs: 4}
cluster: {num_workers: 1}
"""


@dataclass(frozen=True)
class Measured:
    """The ids of both runs, and what the command found."""

    run_id: str
    twin_id: str
    data: dict[str, Any]
    plan: Path
    progress: str


@pytest.fixture(scope="module")
def measured(dab: Dab, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    config = tmp_path_factory.mktemp("configs") / "signs.yaml"
    config.write_text(CONFIG)
    submit = ["submit", config, "--set", f"data.train={digits}"]
    real = ["--set", "name=twin", "--set", "binarize.plan={weights: [], inputs: []}"]
    before = dab.run_ids()
    started = [dab.start(*submit)]
    wait_until(lambda: dab.run_ids() - before)
    started.append(dab.start(*submit, *real))
    ended = [finish(process) for process in started]
    assert [done.code for done in ended] == [0, 0], [done.stderr for done in ended]
    run_id, twin_id = (done.data["run_id"] for done in ended)
    plan = tmp_path_factory.mktemp("plans") / "plan.yaml"
    done = dab("sensitivity", "signs", "--twin", "twin", "--num-images", 200, "-o", plan)
    assert done.code == 0, done.stderr
    return Measured(run_id, twin_id, done.data, plan, done.stderr)


def test_every_layer_is_measured_in_the_run_and_in_its_twin(measured: Measured) -> None:
    data = measured.data
    assert (data["run_id"], data["num_images"]) == (measured.run_id, 200)
    assert [layer["path"] for layer in data["layers"]] == [f"conv{index}" for index in range(1, 9)]
    for layer in data["layers"]:
        is_binary = 2 <= layer["index"] <= 7
        assert layer["binary_weights"] == layer["binary_inputs"] == is_binary
        assert (layer["gain_if_real"] is not None) == (layer["gain_if_real_inputs"] is not None) == is_binary
        assert layer["loss_if_binary"] is not None
        assert layer["input_rmse"] > 0
        assert 0 < layer["weight_error"] < 1
    assert data["twin"]["top1"] > 20


def test_progress_names_each_part(measured: Measured) -> None:
    assert "measuring 16 parts on up to 200 validation images" in measured.progress
    assert "16/16: " in measured.progress
    assert "conv3 of the float twin" in measured.progress


def test_figures_stay_with_the_run(dab: Dab, measured: Measured) -> None:
    record = tracking.find_run(dab.ok("status", measured.run_id)["tracking_uri"], measured.run_id)
    place = dab.home / "artifacts" / record.artifact_uri.removeprefix("mlflow-artifacts:/")
    assert (place / "sensitivity.json").is_file()
    assert record.status == "finished"


def test_the_plan_is_a_file_that_a_run_takes(dab: Dab, measured: Measured) -> None:
    found = load_plan(measured.plan)
    plan = measured.data["plan"]
    assert found == {key: plan[key] for key in ("binary_weights", "binary_inputs")}
    changes = ["name=planned", f"binarize.plan={measured.plan}", *measured.data["without"]]
    arguments = [part for change in changes for part in ("--set", change)]
    ready = dab.ok("submit", measured.data["config"], *arguments, "--dry-run")
    assert ready["packed_bytes"] == plan["packed_bytes"]
    assert yaml.safe_load(measured.plan.read_text())["weights"] == plan["binary_weights"]


def test_another_budget_measures_nothing_again(dab: Dab, measured: Measured) -> None:
    limit = measured.data["plan"]["own_packed_bytes"] + 3000
    done = dab("sensitivity", measured.run_id, "--twin", "twin", "--num-images", 200, "--budget-bytes", limit)
    assert "measured before" in done.stderr
    assert done.data["layers"] == measured.data["layers"]
    assert done.data["plan"]["packed_bytes"] <= limit
    refused = dab("sensitivity", measured.run_id, "--twin", "twin", "--num-images", 200, "--budget-ops", 1)
    assert (refused.code, refused.message.startswith("--budget-ops: 1 operations are too few")) == (2, True)


def test_budgets_that_cannot_be_are_refused_before_anything_starts(dab: Dab) -> None:
    both = dab("sensitivity", "signs", "--budget-ops", 1e6, "--budget-bytes", 1000)
    assert (both.code, both.message) == (2, "--budget-bytes: --budget-ops already limits the plan. Give one of them.")
    endless = dab("sensitivity", "signs", "--budget-ops", "inf")
    assert (endless.code, endless.message.startswith("--budget-ops: inf is no number of operations.")) == (2, True)
    assert dab("sensitivity", "signs", "--num-images", 0).code == 2


def test_a_twin_that_is_none_is_refused(dab: Dab, measured: Measured) -> None:
    binary = dab("sensitivity", "signs", "--twin", "signs")
    assert binary.code == 2
    assert binary.message.startswith("--twin: signs has binary layers; the twin must be a float run")
    own = dab("sensitivity", "twin", "--twin", "twin")
    assert own.message.startswith("--twin: twin is a float run and so its own twin")
