"""What all ranks do in step although it takes each of them another time: waiting, and unequal numbers of batches."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from dabnn.distributed import World

Item = TypeVar("Item")

_POLL_S = 0.5


def wait_together(
    call: Callable[[], object], world: World, on_wait: Callable[[], object], limit_s: float = math.inf
) -> None:
    """Call on every rank, each in a thread, and return when all of them are done; every rank must call it.

    Args:
        call: What may take long on one of them.
        world: The ranks.
        on_wait: Called again and again meanwhile, so that nobody takes the waiting for a hang.
        limit_s: After which the wait ends on all ranks; what is not done goes on in its thread.

    Raises:
        BaseException: What `call` raised on this rank.
    """
    errors: list[BaseException] = []

    def target() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits, which raises it
            errors.append(error)

    thread = threading.Thread(target=target, name="together", daemon=True)
    thread.start()
    began, is_pending, is_late = time.monotonic(), 1, 0
    while is_pending and not is_late:
        thread.join(_POLL_S)
        on_wait()
        is_pending, is_late = world.largest([int(thread.is_alive()), int(time.monotonic() - began > limit_s)])
    for error in errors:
        raise error


def in_rounds(items: Iterable[Item], num_items: int, world: World) -> Iterator[Item | None]:
    """Yield this rank's items, then None as long as other ranks have more; every rank must call it.

    Args:
        items: Of this rank.
        num_items: How many they are.
        world: The ranks.
    """
    (num_rounds,) = world.largest([num_items])
    iterator = iter(items)
    for _ in range(num_rounds):
        yield next(iterator, None)
