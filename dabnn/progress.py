"""Where a run stands, and what `progress.json` says of it."""

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from dabnn.run_folder import RunFolder
from dabnn.spec import TrainSpec

INTERVAL_S = 1.0


@dataclass
class Position:
    """Where a run stands: finished epochs, steps taken within the current one, steps in all, stage from 0."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    stage: int = 0


def progress_of(
    spec: TrainSpec, position: Position, *, num_steps: int, num_samples: int, loss: float, images_per_s: float
) -> dict[str, Any]:
    """Return what `progress.json` holds.

    Args:
        spec: The run.
        position: Where it stands.
        num_steps: Steps of an epoch.
        num_samples: Samples of an epoch.
        loss: Of the last step.
        images_per_s: Rate since the epoch began; 0 where nothing was learned in it yet.
    """
    steps_left = (spec.epochs - position.epoch) * num_steps - position.step_in_epoch
    return {
        "epoch": position.epoch,
        "epochs": spec.epochs,
        "stage": spec.parts[position.stage].name,
        "step": position.step,
        "step_in_epoch": position.step_in_epoch,
        "steps_per_epoch": num_steps,
        "loss": loss,
        "images_per_s": images_per_s,
        "eta_s": steps_left * num_samples / num_steps / images_per_s if images_per_s else None,
        "time": time.time(),
    }


class ProgressWriter:
    """Writes `progress.json` of a run.

    Args:
        spec: The run.
        folder: Its folder.
    """

    def __init__(self, spec: TrainSpec, folder: RunFolder) -> None:
        self._spec, self._folder, self._written_at = spec, folder, 0.0

    @property
    def is_due(self) -> bool:
        """Whether it was not written in the last second."""
        return time.monotonic() - self._written_at >= INTERVAL_S

    def write(self, position: Position, num_steps: int, num_samples: int, loss: float, images_per_s: float) -> None:
        """Replace it; see `progress_of`. A full disk is told by what matters: metrics and checkpoints."""
        self._written_at = time.monotonic()
        progress = progress_of(
            self._spec, position, num_steps=num_steps, num_samples=num_samples, loss=loss, images_per_s=images_per_s
        )
        with contextlib.suppress(OSError):
            self._folder.write_progress(progress)
