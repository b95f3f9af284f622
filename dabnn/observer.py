"""Who is told about a run while it goes on."""

from typing import Protocol


class Observer(Protocol):
    """Who is told about a finished epoch. Called on every rank, in step, so it may communicate."""

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        """Take the metrics of the epoch; `epoch` counts finished epochs, from 1."""


class Silent:
    """An observer that does nothing: the run's folder holds the record anyway."""

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        """Do nothing."""
