"""Small image folders for the tests of the data room."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_tree(
    root: Path,
    num_train: int = 12,
    num_val: int = 4,
    classes: tuple[str, ...] = ("ant", "bee", "cat"),
    size: tuple[int, int] = (6, 6),
    colour: bool = True,
) -> Path:
    """Writes `{train,val}/CLASS/N.png` of random pixels, so many a class; every image differs from every other."""
    generator = np.random.default_rng(0)
    for split, num in (("train", num_train), ("val", num_val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for position in range(num):
                shape = (*size, 3) if colour else size
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{position}.png")
    return root
