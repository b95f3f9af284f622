"""What all ranks do after a step: decided from their flags by a pure function, carried out by the training loop."""

from enum import Enum


class Verdict(Enum):
    """What all ranks do after a step."""

    CONTINUE = "continue"
    STOP = "stop"
    RANK_ERROR = "rank_error"
    NOT_FINITE = "not_finite"


def verdict(stop: int, rank_error: int, not_finite: int) -> tuple[Verdict, str]:
    """Decide from the flags of all ranks (each 0, or 1 if any rank raised it) how to go on, and say why."""
    if rank_error:
        return Verdict.RANK_ERROR, "a rank cannot go on"
    if not_finite:
        return Verdict.NOT_FINITE, "the loss is not finite"
    if stop:
        return Verdict.STOP, "a stop was asked for"
    return Verdict.CONTINUE, ""
