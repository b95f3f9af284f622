"""What a network answers to a split, sample by sample: the confusion matrix, and the mistakes that cost most.

Leaves out sums over samples (`dabnn.evaluate`) and how it looks.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dabnn.data import Batch
from dabnn.evaluate import crop_scores

_DIM_OF_CROPS = 5
_CENTRE_CROP = 4


@dataclass(frozen=True)
class Mistake:
    """A sample whose class did not get the highest score.

    Attributes:
        index: Of the sample in the split.
        label: Its class.
        answer: The class with the highest score.
        probability: That the network gave the answer.
        loss: Cross-entropy, nats.
        image: uint8 (C, H, W), as the network saw it; of ten crops the centre.
    """

    index: int
    label: int
    answer: int
    probability: float
    loss: float
    image: Tensor


@dataclass(frozen=True)
class Answers:
    """The answers to a split.

    Attributes:
        confusion: int64 (classes, classes): samples of the class of the row that got the answer of the column.
        worst: The mistakes with the greatest losses, the greatest first.
    """

    confusion: Tensor
    worst: tuple[Mistake, ...]

    @property
    def num_samples(self) -> int:
        """Samples that were answered."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Percentage that got the answer of their class."""
        return 100 * float(self.confusion.diag().sum()) / max(1, self.num_samples)


@torch.inference_mode()
def answers(
    net: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    num_classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_worst: int = 24,
    on_batch: Callable[[int], None] | None = None,
) -> Answers:
    """Return what a network answers, on the CPU.

    Args:
        net: Images (n, C, H, W) to logits (n, classes), in evaluation mode.
        batches: The split, as single images or as ten crops each.
        num_classes: Number of classes.
        mean: What was subtracted from the images, a channel each, of values from 0 to 1.
        std: What they were divided by.
        num_worst: Mistakes to keep.
        on_batch: Told the number of images that were answered.
    """
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64)
    worst: list[Mistake] = []
    num_seen = 0
    for batch in batches:
        if not len(batch.labels):
            continue
        scores = _scores(net, batch.images)
        confusion += torch.bincount(batch.labels * num_classes + scores.argmax(1), minlength=num_classes**2)
        worst = sorted([*worst, *_mistakes(batch, scores, num_worst, mean, std)], key=lambda one: -one.loss)[:num_worst]
        num_seen += len(batch.labels)
        if on_batch is not None:
            on_batch(num_seen)
    return Answers(confusion.view(num_classes, num_classes), tuple(worst))


def png_of(image: Tensor, side: int) -> bytes:
    """Return an image, uint8 (C, H, W), as a PNG; one narrower than `side` is enlarged by a whole factor."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels[:, :, :3])
    scale = max(1, side // picture.width)
    file = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def _scores(net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return log-probabilities, or their means over ten crops."""
    if images.dim() == _DIM_OF_CROPS:
        return crop_scores(net, images)
    return net(images).float().log_softmax(dim=1)


def _mistakes(
    batch: Batch, scores: Tensor, num_worst: int, mean: Sequence[float], std: Sequence[float]
) -> list[Mistake]:
    losses = -scores.gather(1, batch.labels[:, None])[:, 0]
    answer = scores.argmax(1)
    wrong = (answer != batch.labels).nonzero()[:, 0]
    chosen = wrong[losses[wrong].argsort(descending=True, stable=True)][:num_worst]
    probabilities = scores.softmax(1)
    return [
        Mistake(
            index=int(batch.indices[at]),
            label=int(batch.labels[at]),
            answer=int(answer[at]),
            probability=float(probabilities[at, answer[at]]),
            loss=float(losses[at]),
            image=_pixels(batch.images[at], mean, std),
        )
        for at in chosen.tolist()
    ]


def _pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    single = image[_CENTRE_CROP] if image.dim() == _DIM_OF_CROPS - 1 else image
    values = single * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    return (255 * values).round().clamp(0, 255).to(torch.uint8)
