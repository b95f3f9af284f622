"""Who is told about a run while it goes on, and who may ask something of it between two steps."""

from enum import IntEnum
from typing import Protocol

from dabnn.errors import DabError


class Observer(Protocol):
    """Who is told about a finished epoch. Called on every rank, in step, so it may communicate."""

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        """Take the metrics of the epoch; `epoch` counts finished epochs, from 1."""


class Silent:
    """An observer that does nothing: the run's folder holds the record anyway."""

    def epoch_finished(self, epoch: int, metrics: dict[str, float]) -> None:
        """Do nothing."""


class Wish(IntEnum):
    """What is asked of the loop; of several ranks' wishes the largest counts."""

    GO_ON = 0
    SAVE = 1
    LEAVE = 2


class Watch(Protocol):
    """Who watches one rank. Both methods are called about once a step, and must not communicate or wait."""

    def wish(self) -> Wish:
        """Return what is asked for now: `SAVE` a checkpoint and go on, or save one and `LEAVE` the process.

        A wish that was heard is not repeated: `SAVE` is returned once.
        """

    def alive(self, step: int) -> None:
        """Take a sign of life: a training step was taken, or a batch evaluated; `step` counts those of the run."""


class Unwatched:
    """Asks for nothing."""

    def wish(self) -> Wish:
        """Return that the loop shall go on."""
        return Wish.GO_ON

    def alive(self, step: int) -> None:
        """Do nothing."""


class LeavingError(DabError):
    """The loop saved a checkpoint and left because it was asked to; another attempt goes on from there."""
