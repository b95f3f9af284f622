"""The first images of each class of an image folder, by name: a subset that everybody gets alike.

python benchmarks/subset.py SOURCE DESTINATION --train 500 --val 200
"""

import argparse
import shutil
from pathlib import Path


def copy_first(source: Path, destination: Path, num_images: int) -> int:
    """Copies the first `num_images` files of each class folder of a split; returns how many were copied."""
    copied = 0
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        target = destination / folder.name
        target.mkdir(parents=True, exist_ok=True)
        for image in sorted(folder.iterdir())[:num_images]:
            shutil.copyfile(image, target / image.name)
            copied += 1
    return copied


def main() -> None:
    """Copies both splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with {train,val}/CLASS/*")
    parser.add_argument("destination", type=Path)
    parser.add_argument("--train", type=int, default=500, help="images of a class in train")
    parser.add_argument("--val", type=int, default=200, help="images of a class in val")
    arguments = parser.parse_args()
    for split, num_images in (("train", arguments.train), ("val", arguments.val)):
        copied = copy_first(arguments.source / split, arguments.destination / split, num_images)
        print(f"{split}: {copied} images")


if __name__ == "__main__":
    main()
