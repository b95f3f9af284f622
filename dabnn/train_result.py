"""What the training loop leaves when it ends."""

from dataclasses import dataclass

from dabnn.errors import PassingError
from dabnn.run_store import StoreAwayError

LEAVING, PASSING = "leaving", "passing"  # no result is left: another attempt goes on


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
        status: "finished", "stopped" or "failed".
        message: Why it stopped or failed; empty when finished.
        epoch: Finished epochs.
        step: Optimizer steps taken.
        metrics: Metrics of the last finished epoch.
        weights_sha256: Checksum over rank 0's parameters and buffers, as they are evaluated and exported.
    """

    status: str
    message: str
    epoch: int
    step: int
    metrics: dict[str, float]
    weights_sha256: str


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may well not meet an error."""
    return isinstance(error, PassingError) or isinstance(error.__cause__, StoreAwayError)
