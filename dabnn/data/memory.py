"""What the C library does with freed memory in a process that makes batch after batch."""

import ctypes

# From malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_KEPT = 256 * 2**20


def keep_freed_memory() -> None:
    """Has this process keep freed memory for the next batch, where the C library is glibc.

    By default glibc gives blocks of more than 128 KiB back to the system, which hands them out again page by page, each
    cleared: half of the time of work on images of that size. At most 256 MiB that are not in use are kept.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)
