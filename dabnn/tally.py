"""What is summed up over the steps of a training epoch: accuracy, the order of the samples, bad samples.

Every sum is over the committed steps: a checkpoint holds them as far as they got, so a resumed epoch ends with the sums
of one that was never interrupted.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dabnn.data import Batch
from dabnn.data.bad_samples import BadSamples
from dabnn.data.order_digest import add_digests, from_halves, halves, step_digest
from dabnn.distributed import World
from dabnn.evaluate import Totals


@dataclass
class Tally:
    """Sums over the samples of one rank, or of all.

    Attributes:
        totals: Accuracy and loss.
        order: Digest of which sample was seen in which step, see `dabnn.data.order_digest`.
        bad: Samples that could not be decoded.
    """

    totals: Totals = field(default_factory=Totals)
    order: int = 0
    bad: BadSamples = field(default_factory=BadSamples)

    def add(self, batch: Batch, logits: Tensor, labels: Tensor, losses: Tensor, *, epoch: int, step: int) -> None:
        """Add a rank's share of a step.

        Args:
            batch: Its samples.
            logits: (n, classes).
            labels: (n,), on the device of the logits.
            losses: (n,).
            epoch: Finished epochs.
            step: Steps of the epoch before this one.
        """
        self.totals.add(logits, labels, losses)
        seen = torch.cat([batch.indices, batch.bad_indices]).numpy()
        self.order = add_digests([self.order, step_digest(epoch, step, seen)])
        self.bad.add(epoch, batch.bad)

    def over(self, world: World) -> "Tally":
        """Return the sums over all ranks; every rank must call it."""
        high, low = world.total(halves(self.order))
        return Tally(self.totals.over(world), from_halves(high, low), bad_over(self.bad, world))

    def metrics(self, *, tolerates_bad: bool) -> dict[str, float]:
        """Return `train_loss`, `train_top1`, `train_top5`, `sample_order`, and `bad_samples` where they may occur."""
        bad = {"bad_samples": float(self.bad.num)} if tolerates_bad else {}
        return self.totals.metrics("train_") | {"sample_order": float(self.order)} | bad

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; `from_state` is the inverse."""
        return {"totals": asdict(self.totals), "order": self.order, "bad": asdict(self.bad)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Tally":
        """Return the sums that `state` was taken of."""
        return cls(Totals(**state["totals"]), state.get("order", 0), BadSamples(**state.get("bad", {})))


def bad_over(bad: BadSamples, world: World) -> BadSamples:
    """Return the bad samples of all ranks; every rank must call it."""
    num = int(world.total([float(bad.num)])[0])
    first = next(filter(None, world.gather(bad.first)), "") if num else ""
    return BadSamples(bad.epoch, num, first)
