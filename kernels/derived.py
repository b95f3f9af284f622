"""Arrays derived from tensors, such as rearranged weights, kept for as long as the tensors live unchanged."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor

_Made = TypeVar("_Made")

# Entries die with any of their tensors, so an id is never that of another tensor.
_entries: dict[tuple[Hashable, ...], tuple[list[int], Any, list["weakref.ref[Tensor]"]]] = {}


def derived(name: str, tensors: Sequence[Tensor], key: Hashable, make: Callable[[], _Made]) -> _Made:
    """Returns what `make` made of these tensors, from an earlier call if none of them has been written since.

    Args:
        name: What is derived; one kind of result a name.
        tensors: What it is derived from. Tensors made in inference mode count no writes, so nothing is kept of them.
        key: What else it depends on.
        make: Makes it.

    Returns:
        The result; it must not be changed.
    """
    place = (name, key, *map(id, tensors))
    found = _entries.get(place)
    # Tensors that count no writes have no entry, and cannot be asked for their count.
    if found is not None and found[0] == [tensor._version for tensor in tensors]:  # noqa: SLF001 - torch has no other name
        made: _Made = found[1]
        return made
    if any(tensor.is_inference() for tensor in tensors):
        return make()

    def forget(_dead: "weakref.ref[Tensor]") -> None:
        _entries.pop(place, None)

    made = make()
    versions = [tensor._version for tensor in tensors]  # noqa: SLF001
    _entries[place] = (versions, made, [weakref.ref(tensor, forget) for tensor in tensors])
    return made
