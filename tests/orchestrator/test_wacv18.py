"""The reference program's 21 logged runs as configurations, against what their logs say."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dabnn.data import transforms
from dabnn.models import build, describe
from dabnn.schedules import learning_rate
from orchestrator import config_rules
from orchestrator.config import Config, config_schema, load_config
from orchestrator.config_errors import known_keys
from orchestrator.resolve import train_spec

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "wacv18"
# Of each log: validated epochs, parameters and binary layers of the printed network, and the rates from which epoch on.
LOGS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("wacv18_logs.json").read_text())
PAGE = (ROOT / "docs" / "reference.md").read_text()
FLAGS = [
    "--dataset", "--nClasses", "--data_dir", "--epochs", "--batch-size", "--testbatchsize",
    "--learningratescheduler", "--decayinterval", "--decaylevel", "--optimType", "--maxlr", "--minlr",
    "--model_def", "--name", "-criterion", "--lr", "--momentum", "--nesterov", "--weightDecay", "--inpsize",
    "--workers", "--tenCrop", "--binaryWeight", "--binStart", "--binEnd", "--bnnModel",
    "--calculateBinarizationLosses", "--weight_init", "--resume", "--pretrained_file", "--start-epoch",
    "--testOnly", "--cuda", "--verbose", "--printfreq", "--cachemode", "--manualSeed", "--ngpus", "--logdir",
    "--tensorboard", "--pretrained", "--store", "--evaluate",
]  # fmt: skip


def example(log: str) -> Config:
    return load_config(EXAMPLES / f"{log}.yaml")


def test_every_log_has_its_configuration() -> None:
    assert len(LOGS) == 21
    assert sorted(path.stem for path in EXAMPLES.glob("*.yaml")) == sorted(LOGS)


@pytest.mark.parametrize("log", LOGS)
def test_a_configuration_bears_the_name_of_its_log_and_its_sizes_are_those_of_the_data(log: str) -> None:
    config = example(log)
    assert config.name == log
    dataset = log.partition("_")[0]
    channels, classes = {"tuberlin": (1, 250), "sketchy": (1, 125), "cifar10": (3, 10), "cifar100": (3, 100)}[dataset]
    assert (config.model.in_channels, config.model.num_classes) == (channels, classes)
    assert config.data.mean is not None
    assert len(config.data.mean) == channels
    assert config.data.ten_crop == (channels == 1)


@pytest.mark.parametrize("log", LOGS)
def test_the_learning_rate_of_every_epoch_is_the_logged_one(log: str) -> None:
    spec = train_spec(example(log))
    epochs, rates = LOGS[log]["epochs"], LOGS[log]["rates"]
    assert spec.epochs >= epochs
    for epoch in range(1, epochs + 1):
        logged = next(rate for first, rate in reversed(rates) if first <= epoch)
        for fraction in (0.0, 0.999):
            assert learning_rate(spec.schedule, epoch - 1 + fraction) == pytest.approx(logged, rel=1e-9)


@pytest.mark.parametrize("log", LOGS)
def test_the_learning_rate_of_every_planned_epoch_is_that_of_the_reference_program(log: str) -> None:
    """By its own scheduler, at the options of each log; many logs end long before the epochs that were planned."""
    spec = train_spec(example(log))
    with np.load(Path(__file__).parent / "golden" / "reference_lr_schedules.npz") as golden:
        expected = golden[log]
    found = [learning_rate(spec.schedule, epoch) for epoch in range(int(spec.epochs))]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("log", LOGS)
def test_the_configured_network_is_the_printed_one(log: str) -> None:
    table = describe(build(**train_spec(example(log)).model, seed=0))
    assert table.num_params == LOGS[log]["num_params"]
    first, last = LOGS[log]["layers"] or (1, 0)
    assert [layer.index for layer in table.layers if layer.binary_weights] == list(range(first, last + 1))


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its two head rows."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_every_flag_of_the_reference_program_has_a_row() -> None:
    named = [flag for row in rows("Its command line and ours") for flag in re.findall(r"`(-[-\w]+)`", row[0])]
    assert sorted(named) == sorted(FLAGS)


def test_the_keys_that_stand_for_its_flags_exist() -> None:
    sections = tuple(f"{name}." for name in config_schema()["properties"])
    cells = [row[1] for row in rows("Its command line and ours")]
    named = [key for cell in cells for key in re.findall(r"`([a-z_.]+)(?:: [^`]*)?`", cell) if key.startswith(sections)]
    assert len(named) > 20
    assert set(named) <= set(known_keys(Config))


def test_every_run_has_a_row_with_its_file() -> None:
    linked = [re.search(r"\(\.\./examples/wacv18/(.*)\.yaml\)", row[0]) for row in rows("The 21 logged runs")]
    assert sorted(match.group(1) for match in linked if match) == sorted(LOGS)


def test_the_configuration_knows_which_transforms_crop() -> None:
    assert config_rules.CROPPING == transforms.CROPPING
    choices = config_schema()["$defs"]["Data"]["properties"]["transform"]["enum"]
    assert sorted(choices) == sorted(transforms.NAMES)
