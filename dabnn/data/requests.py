"""What one rank reads, in order, and what it will read soon: bookkeeping between `order` and whoever reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from dabnn.data.order import epoch_order, partners

# A window may be as small as a sample; less than this ahead, fetching would not keep up.
_MIN_AHEAD = 4096
_MAX_ORDERS = 2


class Fetches(Protocol):
    """Who can begin to fetch samples before they are read."""

    def prefetch(self, indices: NDArray[np.int64]) -> None:
        """Begin to fetch what holds these samples, which are read soon and in this order."""


@dataclass(frozen=True)
class Request:
    """A batch that somebody is to read.

    Attributes:
        epoch: Of the augmentations.
        step: In the epoch.
        indices: int64 (n,): this rank's samples of the step.
        partners: int64 (n,): the sample that each is mixed with, or None.
        global_size: Samples of the step over all ranks.
    """

    epoch: int
    step: int
    indices: NDArray[np.int64]
    partners: NDArray[np.int64] | None
    global_size: int


class Plan:
    """One rank's batches, epoch after epoch.

    Args:
        steps: Positions in an epoch's order that each step takes, over all ranks.
        blocks: The part of each step that this rank takes.
        shard_sizes: Samples of each shard.
        seed: Of the order.
        shuffle: Whether there is one; else the split's own.
        window: Samples that are mixed with each other, see `order.epoch_order`.
        is_mixing: Whether each sample has a partner.
    """

    def __init__(
        self,
        steps: tuple[range, ...],
        blocks: tuple[range, ...],
        shard_sizes: tuple[int, ...],
        *,
        seed: int,
        shuffle: bool,
        window: int,
        is_mixing: bool = False,
    ) -> None:
        self.steps, self.blocks, self.shard_sizes = steps, blocks, shard_sizes
        self.seed, self.shuffle, self.window, self.is_mixing = seed, shuffle, window, is_mixing
        self._orders: dict[int, NDArray[np.int64]] = {}

    def requests(self, epoch: int, step: int) -> Iterator[Request]:
        """Yields the requests from a position on, without end."""
        while self.blocks:
            for number in range(step, len(self.blocks)):
                yield self.request(epoch, number)
            epoch, step = epoch + 1, 0

    def request(self, epoch: int, number: int) -> Request:
        """Returns the request for one step."""
        step, block, order = self.steps[number], self.blocks[number], self.order(epoch)
        others = order[partners(step, block)] if self.is_mixing else None
        return Request(epoch, number, order[block.start : block.stop], others, len(step))

    def coming(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Returns this rank's samples from a step on to the end of the window after its own, in the order of reading.

        Where the epoch ends before that, the shuffled first window of the next one follows.
        """
        ahead = max(self.window, _MIN_AHEAD)
        end = (self.blocks[step].start // ahead + 2) * ahead
        found = self._between(epoch, step, end)
        if end <= self.blocks[-1].stop or not self.shuffle:
            return found
        return np.concatenate([found, self._between(epoch + 1, 0, ahead)])

    def window_of(self, epoch: int, step: int) -> tuple[int, int]:
        """Returns epoch and number of the window in which a step begins; `coming` is worth asking for at each."""
        return epoch, self.blocks[step].start // max(self.window, _MIN_AHEAD)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Returns the samples in the order of an epoch; those of two epochs are kept."""
        if not self.shuffle:
            epoch = 0
        if epoch not in self._orders:
            while len(self._orders) >= _MAX_ORDERS:
                del self._orders[min(self._orders)]
            self._orders[epoch] = (
                epoch_order(self.seed, epoch, self.shard_sizes, self.window)
                if self.shuffle
                else np.arange(sum(self.shard_sizes))
            )
        return self._orders[epoch]

    def _between(self, epoch: int, step: int, end: int) -> NDArray[np.int64]:
        order = self.order(epoch)
        parts = [order[block.start : block.stop] for block in self.blocks[step:] if block.start < end]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


class Requests(Sampler[Request]):
    """The requests from `start` on; the loader asks for a new iterator after each move of it.

    Args:
        plan: What is read.
        reader: Told what is read soon.
        start: Epoch and step.
    """

    def __init__(self, plan: Plan, reader: Fetches, start: tuple[int, int] = (0, 0)) -> None:
        self.plan, self.reader, self.start = plan, reader, start

    def __iter__(self) -> Iterator[Request]:
        window = None
        for request in self.plan.requests(*self.start):
            now = self.plan.window_of(request.epoch, request.step)
            if now != window:
                self.reader.prefetch(self.plan.coming(request.epoch, request.step))
                window = now
            yield request
