"""The nearest known name to one that was mistyped."""

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that reads most like `word`, or None when there is none to choose from.

    Dotted names are compared whole and by their last part, so `epochs` finds `train.epochs` although the section is
    missing, and a last part that holds the word counts for more, so `lr` finds `optim.max_lr`. Equally near candidates
    are decided by their order.
    """
    return max(candidates, key=lambda candidate: _likeness(word.lower(), candidate.lower()), default=None)


def _likeness(word: str, candidate: str) -> float:
    whole = SequenceMatcher(None, word, candidate).ratio()
    last_word, last_part = word.rpartition(".")[2], candidate.rpartition(".")[2]
    return (
        whole
        + SequenceMatcher(None, last_word, last_part).ratio()
        + (0.5 if len(last_word) > 1 and last_word in last_part else 0.0)
    )
