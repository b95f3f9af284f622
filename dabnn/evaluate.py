r"""Accuracy of a network over a split: each sample once, whatever the number of ranks.

A sample that comes as ten crops x_1 .. x_10 (`dabnn.data.crops`) scores s_k = (1 / 10) sum_j log p_k(x_j) for class k,
where p(x) = softmax(net(x)): up to a common factor the geometric mean of the probabilities, as in the reference program
(arXiv 1804.02941). The class with the highest s_k is the answer. The s_k are not normalised again, so the loss -s_y of
class y is the mean of the crops' cross-entropies.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dabnn.data import Batch
from dabnn.distributed import World

_DIM_OF_CROPS = 5


@dataclass
class Totals:
    """Sums over samples, from which the metrics follow; sums of ranks may be added.

    Attributes:
        loss: Sum of the cross-entropies of the samples.
        top1: Samples whose class has the highest logit.
        top5: Samples whose class is among the five highest logits (or among all, with fewer classes).
        num_samples: Number of samples.
    """

    loss: float = 0.0
    top1: float = 0.0
    top5: float = 0.0
    num_samples: float = 0.0

    def add(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Add a batch: `logits` or other scores (n, classes), `labels` (n,) and the samples' losses (n,)."""
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == labels[:, None]
        self.loss += float(losses.double().sum())
        self.top1 += float(hits[:, 0].sum())
        self.top5 += float(hits.sum())
        self.num_samples += len(labels)

    def plus(self, other: "Totals") -> "Totals":
        """Return the sums over the samples of both."""
        return Totals(
            self.loss + other.loss, self.top1 + other.top1, self.top5 + other.top5, self.num_samples + other.num_samples
        )

    def over(self, world: World) -> "Totals":
        """Return the sums over all ranks; every rank must call it."""
        return Totals(*world.total([self.loss, self.top1, self.top5, self.num_samples]))

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return `{prefix}loss` (mean), `{prefix}top1` and `{prefix}top5` (percent)."""
        count = max(self.num_samples, 1.0)
        shares = {"top1": self.top1, "top5": self.top5}
        return {f"{prefix}loss": self.loss / count} | {
            f"{prefix}{key}": 100 * hit / count for key, hit in shares.items()
        }


@torch.inference_mode()
def count(net: Callable[[Tensor], Tensor], batches: Iterable[Batch], device: torch.device) -> Totals:
    """Return the sums over the samples of `batches`; the sums of several ranks add up with `Totals.over`.

    Args:
        net: Images (n, C, H, W) to logits (n, classes); a module must be in evaluation mode.
        batches: This rank's part of the split, as single images or ten crops each; ranks may hold different numbers.
        device: Where `net` is.
    """
    totals = Totals()
    for batch in batches:
        if not len(batch.labels):  # all of them bad, and tolerated
            continue
        labels = batch.labels.to(device)
        images = batch.images.to(device)
        if images.dim() == _DIM_OF_CROPS:
            scores = crop_scores(net, images)
            losses = F.nll_loss(scores, labels, reduction="none")
        else:
            scores = net(images)
            losses = F.cross_entropy(scores, labels, reduction="none")
        totals.add(scores, labels, losses)
    return totals


def crop_scores(net: Callable[[Tensor], Tensor], crops: Tensor) -> Tensor:
    """Return the mean of the log-probabilities over the crops of each sample, by the formula above.

    Args:
        net: Images (n, C, H, W) to logits (n, classes).
        crops: float (n, crops, C, H, W).

    Returns:
        float32 (n, classes).
    """
    logits = net(crops.flatten(0, 1)).float()
    scores: Tensor = logits.log_softmax(dim=1).unflatten(0, crops.shape[:2])
    return scores.mean(dim=1)
