"""Arrays derived from tensors, such as rearranged weights, kept for as long as the tensors live unchanged."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_Made = TypeVar("_Made")

# Results kept for the same tensors, such as those of images of many sizes; the oldest goes first.
MAX_KEYS = 32
_PLAIN = (Tensor, torch.nn.Parameter)


class _Entry(NamedTuple):
    """What was made of some tensors in one state.

    Attributes:
        state: Of each tensor the count of its writes and the address of its values.
        made: Results by key.
        aliases: The same values under other objects: as long as they live, no other values have their addresses.
        tensors: The tensors; an entry dies with any of them, so an id is never that of another tensor.
    """

    state: list[tuple[int, int]]
    made: dict[Hashable, Any]
    aliases: list[Tensor]
    tensors: list["weakref.ref[Tensor]"]


_entries: dict[tuple[Hashable, ...], _Entry] = {}


def derived(name: str, tensors: Sequence[Tensor], key: Hashable, make: Callable[[], _Made]) -> _Made:
    """Returns what `make` made of these tensors, from an earlier call if none of them has been written since.

    A write is one that torch counts, or another place for the values (`tensor.data = ...`, `module.to(...)`). Values
    written behind torch's back, into `tensor.data` or through NumPy, are not seen: write in `torch.no_grad()` instead.

    Args:
        name: What is derived; one kind of result a name.
        tensors: What it is derived from. Tensors made in inference mode count no writes, those of a compiler have no
            values: nothing is kept of them.
        key: What else it depends on. The results of the last 32 keys are kept.
        make: Makes it.

    Returns:
        The result; it must not be changed.
    """
    place = (name, *map(id, tensors))
    entry = _entries.get(place)
    # Tensors that count no writes have no entry, and cannot be asked for their count.
    if entry is not None and entry.state == _state(tensors):
        if key in entry.made:
            known: _Made = entry.made[key]
            return known
    elif any(tensor.is_inference() or type(tensor) not in _PLAIN for tensor in tensors):
        return make()
    else:
        entry = None
    made = make()
    if entry is None:
        entry = _entries[place] = _new_entry(place, tensors)
    if len(entry.made) >= MAX_KEYS:
        entry.made.pop(next(iter(entry.made)), None)
    entry.made[key] = made
    return made


def _state(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(tensor._version, tensor.data_ptr()) for tensor in tensors]  # noqa: SLF001 - torch has no other name for it


def _new_entry(place: tuple[Hashable, ...], tensors: Sequence[Tensor]) -> _Entry:
    def forget(_dead: "weakref.ref[Tensor]") -> None:
        _entries.pop(place, None)

    references = [weakref.ref(tensor, forget) for tensor in tensors]
    return _Entry(_state(tensors), {}, [tensor.detach() for tensor in tensors], references)
