"""A run whose folder lies in an S3 store: stopped, resumed where only the store was left, delivered, freed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from program import ROOT, Dab, wait_until
from s3_server import S3Server

from orchestrator.mlflow_client import unchecked_client

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = ROOT / "examples" / "digits.yaml"
EPOCHS = 6


@pytest.fixture(scope="module")
def submitted(dab: Dab, store: S3Server, digits: Path) -> dict[str, str]:
    """Two runs of the same configuration: one in the store, stopped in mid-epoch; one in a folder, left alone."""
    ids = {}
    for name, storage in (("stored", "s3://bucket/dab"), ("local", str(dab.home / "elsewhere"))):
        values = [
            f"name={name}", f"storage={storage}", f"data.train={digits}", "data.batch_size=32", "model.width=0.0625",
            f"train.epochs={EPOCHS}", "train.checkpoint.every_steps=5", "cluster.num_workers=2",
        ]  # fmt: skip
        changes = [part for value in values for part in ("--set", value)]
        ids[name] = str(dab.ok("submit", CONFIG, *changes, "--detach")["run_id"])
    return ids


@pytest.fixture(scope="module")
def resumed(dab: Dab, store: S3Server, submitted: dict[str, str]) -> dict[str, Any]:
    """The stored run, stopped through the store and resumed where nothing of it was left but the store."""
    run_id = submitted["stored"]
    wait_until(lambda: [name for name in store.names(f"dab/{run_id}/checkpoints") if name.endswith(".json")], 300)
    stopped = dab.ok("stop", run_id)
    assert stopped["status"] == "stopped"
    assert 0 < stopped["step"] < EPOCHS * 45
    assert all(checkpoint["path"].startswith(f"s3://bucket/dab/{run_id}/") for checkpoint in stopped["checkpoints"])
    shutil.rmtree(dab.home / "storage-cache")
    dab.ok("resume", run_id)
    return dict(dab.ok("status", run_id))


def test_a_run_in_the_store_ends_as_one_in_a_folder(
    dab: Dab, resumed: dict[str, Any], submitted: dict[str, str]
) -> None:
    wait_until(lambda: dab.ok("status", submitted["local"])["status"] == "finished", 300, 2.0)
    local = dab.ok("status", submitted["local"])
    assert resumed["status"] == "finished"
    assert resumed["attempts"] == 2
    assert resumed["weights_sha256"] == local["weights_sha256"]
    assert resumed["metrics"]["val_top1"] == local["metrics"]["val_top1"]


def test_the_tracker_has_every_epoch_of_it(dab: Dab, resumed: dict[str, Any], submitted: dict[str, str]) -> None:
    client = unchecked_client(str(resumed["tracking_uri"]))
    history = client.get_metric_history(submitted["stored"], "val_top1")
    assert sorted(point.step for point in history) == list(range(1, EPOCHS + 1))


def test_it_is_evaluated_exported_and_logged_from_the_store(
    dab: Dab, resumed: dict[str, Any], submitted: dict[str, str], tmp_path: Path
) -> None:
    run_id = submitted["stored"]
    assert dab.ok("evaluate", run_id)["num_samples"] > 0
    assert dab.ok("export", run_id, "-o", tmp_path / "model.safetensors")["same_argmax"] >= 0.995
    assert "epoch" in dab.ok("logs", run_id)["text"]
    assert resumed["folder"] == f"s3://bucket/dab/{run_id}"


def test_its_weights_begin_another_run(dab: Dab, resumed: dict[str, Any], digits: Path) -> None:
    arguments = ["--set", f"data.train={digits}", "--set", "train.init_from=stored", "--set", "model.width=0.0625"]
    shown = dab.ok("submit", CONFIG, *arguments, "--dry-run")
    assert shown["config"]["train"]["init_from"].startswith("s3://bucket/dab/")


def test_a_deleted_run_is_freed_in_the_store_and_others_stay(
    dab: Dab, store: S3Server, resumed: dict[str, Any], submitted: dict[str, str]
) -> None:
    run_id = submitted["stored"]
    unchecked_client(str(resumed["tracking_uri"])).delete_run(run_id)
    progress = store.objects / "dab" / run_id / "progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"time": 0}))  # as if it had ended long ago
    kept = dab.ok("runs", "gc", "--dry-run")
    assert [waste["place"] for waste in kept["left"] if waste["kind"] == "deleted run"] == [f"s3://bucket/dab/{run_id}"]
    assert store.names(f"dab/{run_id}")
    freed = dab.ok("runs", "gc", "--yes")
    assert freed["freed_bytes"] > 0
    assert not store.names(f"dab/{run_id}")
    assert dab.ok("status", submitted["local"])["checkpoints"]
