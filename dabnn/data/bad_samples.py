"""Counts the samples of an epoch that cannot be decoded, and says when there are too many.

They are left out of their steps, in which they weigh nothing. None is tolerated unless a run says so.
"""

from dataclasses import dataclass

from dabnn.errors import DabError


@dataclass
class BadSamples:
    """Bad samples of one epoch.

    Attributes:
        epoch: Finished epochs before it.
        num: How many.
        first: What is wrong with the first one: shard, key, name and trouble.
    """

    epoch: int = 0
    num: int = 0
    first: str = ""

    def add(self, epoch: int, bad: tuple[str, ...]) -> None:
        """Count what a batch of an epoch left out; another epoch begins from none."""
        if epoch != self.epoch:
            self.epoch, self.num, self.first = epoch, 0, ""
        self.first = self.first or next(iter(bad), "")
        self.num += len(bad)

    def check(self, num_samples: int, max_fraction: float) -> None:
        """Refuse more bad samples than a share of the epoch.

        Args:
            num_samples: Samples of the epoch.
            max_fraction: Share that is tolerated.

        Raises:
            DabError: Names the first one.
        """
        if self.num > max_fraction * num_samples:
            raise DabError(
                f"data.max_bad_fraction: {self.num} of the {num_samples} samples of epoch {self.epoch + 1} cannot be "
                f"decoded, more than {max_fraction:g} of them; the first: {self.first}. List them with `dab data "
                "check` and build the dataset again, or tolerate more."
            )
