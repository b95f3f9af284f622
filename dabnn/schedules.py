r"""Learning-rate schedules as one pure function of the fractional epoch.

Nothing here holds a position: a resumed run asks for the epoch it is at and gets the same rate. With T = `epochs` less
`warmup_epochs` and t the epochs since warm-up, never more than T:

| name | rate |
| --- | --- |
| decay | max(max_lr / level^floor(t / interval), min_lr), the reference program's schedule (arXiv 1804.02941); t is not cut at T |
| step | max(max_lr / level^m, min_lr), m the number of `milestones` that the epoch has reached, counted with warm-up (torch's MultiStepLR) |
| cosine | min_lr + (max_lr - min_lr) (1 + cos(pi t / T)) / 2 (SGDR without restarts, arXiv 1608.03983, equation 5) |
| linear | max_lr + (min_lr - max_lr) t / T |
| constant | max_lr |
| one_cycle | half a cosine up from min_lr to max_lr over the first 30 % of T, then half a cosine down to min_lr (Smith and Topin, arXiv 1708.07120; 30 % as in `torch.optim.lr_scheduler.OneCycleLR`) |

Warm-up, before t = 0: (epoch / warmup_epochs) times the schedule's first rate, so it starts at zero; ask for the middle
of a step rather than its start if the first step must count.
"""  # noqa: E501 - table rows

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dabnn.choices import unknown_choice
from dabnn.errors import InvalidInputError

ONE_CYCLE_RISE = 0.3


@dataclass(frozen=True)
class Schedule:
    """What the learning rate does over a run; rates without unit, times in epochs.

    Attributes:
        name: decay, step, cosine, linear, constant or one_cycle.
        max_lr: highest rate.
        epochs: length of the run, warm-up included.
        min_lr: lowest rate after warm-up.
        interval: decay: epochs between two divisions.
        level: decay, step: divisor.
        warmup_epochs: linear rise before the schedule starts.
        milestones: step: rising epochs, counted from the start of the run.
    """

    name: str
    max_lr: float
    epochs: float
    min_lr: float = 0.0
    interval: float = 50
    level: float = 2
    warmup_epochs: float = 0
    milestones: Sequence[float] = ()

    def __post_init__(self) -> None:
        """Raise InvalidInputError, naming the field, for values that give no schedule."""
        if self.name not in _CURVES:
            raise unknown_choice("schedule.name", self.name, _CURVES)
        _require(self.max_lr > 0, "optim.max_lr", self.max_lr, "must be above 0")
        _require(
            0 <= self.min_lr <= self.max_lr, "optim.min_lr", self.min_lr, f"must lie in 0 .. {self.max_lr} (max_lr)"
        )
        _require(self.epochs > 0, "train.epochs", self.epochs, "must be above 0")
        _require(self.interval > 0, "schedule.interval", self.interval, "must be above 0")
        _require(self.level >= 1, "schedule.level", self.level, "divides the rate, so it must be at least 1")
        falls = self.name == "step" and not all(a < b for a, b in itertools.pairwise(self.milestones))
        _require(not falls, "schedule.milestones", list(self.milestones), "must rise from each to the next")
        below = 0 <= self.warmup_epochs < self.epochs
        _require(
            below, "schedule.warmup_epochs", self.warmup_epochs, f"must lie below the {self.epochs} epochs of the run"
        )


def learning_rate(schedule: Schedule, epoch: float) -> float:
    """Return the rate at a fractional epoch (0 is the start of the run) by the formulas at the top of this module."""
    curve = _CURVES[schedule.name]
    if epoch < schedule.warmup_epochs:
        return curve(schedule, 0.0) * epoch / schedule.warmup_epochs
    return curve(schedule, epoch - schedule.warmup_epochs)


def _require(holds: bool, field: str, value: object, limit: str) -> None:
    if not holds:
        raise InvalidInputError(f"{field}: {value} {limit}.")


def _fraction(schedule: Schedule, t: float) -> float:
    return min(t / (schedule.epochs - schedule.warmup_epochs), 1.0)


def _between(low: float, high: float, phase: float) -> float:
    """Return the half cosine that is `high` at phase 0 and `low` at phase 1."""
    return low + (high - low) * (1 + math.cos(math.pi * phase)) / 2


def _decay(schedule: Schedule, t: float) -> float:
    # A negative power, since it underflows to zero where the positive one overflows.
    return max(schedule.max_lr * float(schedule.level) ** -math.floor(t / schedule.interval), schedule.min_lr)


def _step(schedule: Schedule, t: float) -> float:
    reached = sum(milestone <= t + schedule.warmup_epochs for milestone in schedule.milestones)
    return max(schedule.max_lr * float(schedule.level) ** -reached, schedule.min_lr)


def _cosine(schedule: Schedule, t: float) -> float:
    return _between(schedule.min_lr, schedule.max_lr, _fraction(schedule, t))


def _linear(schedule: Schedule, t: float) -> float:
    return schedule.max_lr + (schedule.min_lr - schedule.max_lr) * _fraction(schedule, t)


def _constant(schedule: Schedule, _: float) -> float:
    return schedule.max_lr


def _one_cycle(schedule: Schedule, t: float) -> float:
    fraction = _fraction(schedule, t)
    if fraction < ONE_CYCLE_RISE:
        return _between(schedule.max_lr, schedule.min_lr, fraction / ONE_CYCLE_RISE)
    return _between(schedule.min_lr, schedule.max_lr, (fraction - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE))


_CURVES: Mapping[str, Callable[[Schedule, float], float]] = {
    "decay": _decay,
    "step": _step,
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "one_cycle": _one_cycle,
}
