"""One message for every name that is not in a list: what was asked, the nearest known name, and the whole list."""

from collections.abc import Iterable
from difflib import get_close_matches

from dabnn.errors import InvalidInputError


def unknown_choice(field: str, value: str, known: Iterable[str]) -> InvalidInputError:
    """Return the error for `value`, which is none of the `known` names of `field`, naming the nearest one."""
    names = list(known)
    nearest = get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return InvalidInputError(f"{field}: {value!r} is not known.{hint} Known: {', '.join(names)}.")
