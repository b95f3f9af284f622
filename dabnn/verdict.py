"""What all ranks do after a step: decided from their flags by a pure function, carried out by the training loop."""

from enum import Enum


class Verdict(Enum):
    """What all ranks do after a step."""

    CONTINUE = "continue"
    STOP = "stop"
    LEAVE = "leave"
    RANK_ERROR = "rank_error"
    NOT_FINITE = "not_finite"
    BITS_DIFFER = "bits_differ"

    @property
    def is_failure(self) -> bool:
        """Whether the run ends failed."""
        return self in (Verdict.RANK_ERROR, Verdict.NOT_FINITE, Verdict.BITS_DIFFER)

    @property
    def is_stop(self) -> bool:
        """Whether it ends for now, and goes on later."""
        return self in (Verdict.STOP, Verdict.LEAVE)


def verdict(
    stop: int, rank_error: int, not_finite: int, *, leave: int = 0, has_equal_bits: bool = True
) -> tuple[Verdict, str]:
    """Decide how to go on, and say why.

    Args:
        stop: 1 if any rank was asked to stop, else 0.
        rank_error: 1 if any rank cannot go on.
        not_finite: 1 if the loss or the gradient of any rank is not finite.
        leave: 1 if the process of any rank must end soon, and another attempt shall go on.
        has_equal_bits: Whether all ranks hold the same binary weights, see `dabnn.agreement`.
    """
    if rank_error:
        return Verdict.RANK_ERROR, "a rank cannot go on"
    if not_finite:
        return Verdict.NOT_FINITE, "the loss or its gradient is not finite"
    if not has_equal_bits:
        return Verdict.BITS_DIFFER, "the ranks hold different bits"
    if stop:
        return Verdict.STOP, "a stop was asked for"
    if leave:
        return Verdict.LEAVE, "the process of a rank must end"
    return Verdict.CONTINUE, ""
