"""Everything between the stored bytes of samples and a batch: reading, decoding, augmentation, normalisation.

Which samples make a batch is decided by `order`, who asks for them is `stream`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dabnn.data.images import decode_image
from dabnn.data.order import sample_seed
from dabnn.data.reader import SampleReader
from dabnn.data.transforms import Transform


@dataclass(frozen=True)
class Prepared:
    """What became of the samples that were asked for, in their order; those that cannot be decoded are left out.

    Attributes:
        images: (n, C, S, S), normalised float32; (n, 10, C, S, S) where the transform makes ten crops.
        labels: int64 (n,).
        indices: int64 (n,): each sample's index in the split.
        bad: Shard, key, name and trouble of each sample that was left out.
        partner_labels: int64 (n,): with mixing, the labels of the images that were mixed in.
        weights: float32 (n,): with mixing, the share of the first label: loss = w CE(label) + (1 - w) CE(partner).
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: tuple[str, ...] = ()
    partner_labels: Tensor | None = None
    weights: Tensor | None = None


class Pipeline:
    """Turns indices of samples into batches; a copy that was pickled to another process does the same there.

    Args:
        reader: Of the stored samples.
        transform: What becomes of an image.
        seed: Of the augmentations, which depend on it, the epoch and the sample's index alone.
    """

    def __init__(self, reader: SampleReader, transform: Transform, seed: int) -> None:
        self.reader = reader
        self.transform = transform
        self.seed = seed

    @property
    def modules(self) -> tuple[str, ...]:
        """What the process that loaders are forked from should import, so that they need not."""
        return (__name__, type(self.transform.augmentation).__module__)

    def batch(
        self,
        indices: NDArray[np.int64],
        epoch: int,
        partners: NDArray[np.int64] | None = None,
        *,
        finished: bool = True,
    ) -> Prepared:
        """Reads, decodes, augments and normalises samples.

        Args:
            indices: Of the samples in the split.
            epoch: That the augmentations are drawn for.
            partners: With mixing, the sample that is mixed into each.
            finished: Whether images are normalised; else they stay uint8, for `Transform.batch` on the device.

        Returns:
            The batch.

        Raises:
            DabError: A shard cannot be read.
        """
        if partners is not None:
            raise NotImplementedError("mixing")
        pixels: list[Tensor] = []
        labels: list[int] = []
        kept: list[int] = []
        bad: list[str] = []
        state = torch.get_rng_state()
        try:
            for index in indices.tolist():
                data, label = self.reader.read(index)
                try:
                    pixels.append(self._transform(data, index, epoch))
                except ValueError as error:
                    bad.append(f"{self.reader.describe(index)}: does not decode: {error}")
                    continue
                labels.append(label)
                kept.append(index)
        finally:
            torch.set_rng_state(state)
        size = self.transform.input_size
        stacked = (
            torch.stack(pixels) if pixels else torch.empty(0, self.transform.in_channels, size, size, dtype=torch.uint8)
        )
        images = self.transform.batch(stacked) if finished else stacked
        return Prepared(
            images, torch.tensor(labels, dtype=torch.int64), torch.tensor(kept, dtype=torch.int64), tuple(bad)
        )

    def close(self) -> None:
        """Closes the files; reading again opens them again."""
        self.reader.close()

    def _transform(self, data: bytes, index: int, epoch: int) -> Tensor:
        image = decode_image(data)
        if self.transform.augmentation is not None:
            # Only the CPU generator: torch.manual_seed would reseed the devices of the training process, too.
            torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
        return self.transform.sample(image)
