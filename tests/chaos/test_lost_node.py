"""The chaos suite in short: one node of a cluster of several machines is lost in mid-epoch, and nobody can tell."""

from pathlib import Path

import pytest
from lab import Lab, kill
from trial import measure, plain_run, problems, submit

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_node_lost_in_mid_epoch_changes_nothing(lab: Lab, data: Path) -> None:
    epochs = "train.epochs=5"
    trial = submit(lab, "short", data, epochs)
    trial.wait_for_step(20)
    outcome = measure(trial, "the raylet of a node is killed", lambda: kill(lab.raylet("node2")))
    trial.finish()
    assert outcome.attempts == 2
    assert problems(trial, plain_run(lab, data, "whole", epochs)) == []
