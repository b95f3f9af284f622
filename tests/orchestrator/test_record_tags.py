from pathlib import Path

import pytest

from dabnn.data import load_manifest
from orchestrator.config import Config, load_config, with_overrides
from orchestrator.record_tags import record_of
from orchestrator.resolve import resolve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(small_digits: Path) -> Config:
    changes = [f"data.train={small_digits}", f"data.val={small_digits}", "model.width=0.0625"]
    return resolve(load_config(ROOT / "examples" / "digits.yaml", changes))


def test_a_run_is_recorded_with_its_data_and_what_it_is(config: Config, small_digits: Path) -> None:
    record = record_of(config)
    digest = load_manifest(small_digits).digest
    assert record.tags["dab.data_digest"] == digest
    assert {"dab.model_digest", "dab.plan_digest", "dab.packed_bytes"} <= record.tags.keys()
    assert [(each.context, each.num_samples, each.num_classes, each.digest) for each in record.inputs] == [
        ("train", 240, 10, digest),
        ("val", 60, 10, digest),
    ]


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"optim.max_lr": 0.5, "seed": 7, "binarize.weights": "xnor"}, set()),
        ({"binarize.bin_end": 5}, {"dab.plan_digest", "dab.packed_bytes"}),
        ({"model.width": 0.125}, {"dab.model_digest", "dab.packed_bytes"}),
    ],
)
def test_digests_change_with_what_they_stand_for(config: Config, change: dict[str, object], changed: set[str]) -> None:
    before, after = record_of(config).tags, record_of(with_overrides(config, change)).tags
    assert {key for key in before if before[key] != after[key]} == changed


def test_a_run_that_cannot_be_is_recorded_all_the_same(config: Config, tmp_path: Path) -> None:
    record = record_of(with_overrides(config, {"data.train": str(tmp_path / "none")}))
    assert "dab.model_digest" in record.tags
    assert (record.inputs, "dab.data_digest" in record.tags) == ((), False)
