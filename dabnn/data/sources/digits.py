"""The handwritten digits of scikit-learn: a data set that is always there."""

import io
from dataclasses import dataclass
from functools import lru_cache

from dabnn.data.sources.records import SPLITS, Record, Source, split_class

BUILTIN_PREFIX = "builtin:"
_SEED = 0
_VAL_FRACTION = 0.2


def digits() -> Source:
    """Lists the handwritten digits that scikit-learn ships, as 8x8 gray PNG files.

    1,797 images of 10 classes (Alpaydin and Kaynak 1998), the test part of UCI "Optical Recognition of Handwritten
    Digits". Values 0 to 16 become 0 to 255. Of every class 20 % are drawn into `val` with a fixed seed.

    Returns:
        The source; a record's name is its class and its position in scikit-learn's table.
    """
    records: dict[int, list[Record]] = {}
    for name, data in _files().items():
        label = int(name.partition("/")[0])
        records.setdefault(label, []).append(Record(name, label, "png", len(data)))
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for label in sorted(records):
        for split, chosen in zip(SPLITS, split_class(records[label], _VAL_FRACTION, _SEED, label), strict=True):
            splits[split] += chosen
    return Source(
        name=f"{BUILTIN_PREFIX}digits",
        classes=tuple(str(label) for label in sorted(records)),
        splits={split: tuple(listed) for split, listed in splits.items()},
        read=DigitsRead(),
        format="digits",
    )


@dataclass(frozen=True)
class DigitsRead:
    """Reads one of scikit-learn's digits as a PNG file."""

    def __call__(self, record: Record) -> bytes:
        """Returns the PNG file."""
        return _files()[record.name]


@lru_cache(maxsize=1)
def _files() -> dict[str, bytes]:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    table = load_digits()
    pixels = np.rint(table.images * (255 / 16)).astype(np.uint8)
    files = {}
    for row, label in enumerate(table.target):
        buffer = io.BytesIO()
        Image.fromarray(pixels[row]).save(buffer, "PNG")
        files[f"{label}/{row:04d}.png"] = buffer.getvalue()
    return files
