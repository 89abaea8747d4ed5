"""Settings of the memory allocator."""

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc's malloc keep and reuse freed memory, for training on a CPU.

    By default it maps and unmaps memory for each large tensor, and page faults take a tenth of the time of small
    models. Does nothing with another C library.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
