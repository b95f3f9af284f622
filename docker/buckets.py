"""Create buckets in the object store that the environment names: `python buckets.py NAME...`; existing ones stay."""

import sys

import s3fs

store = s3fs.S3FileSystem()
for name in sys.argv[1:]:
    if not store.exists(name):
        store.mkdir(name)
    print(f"bucket {name}: there")  # noqa: T201
