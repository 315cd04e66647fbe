"""Keeps freed memory in the process, on CPU.

glibc gives large freed blocks back to the kernel at once, and the next allocation of the same size faults every page in
again, zeroed: for activations, gradients and the whole buffers of ZeRO stage 3 that is gigabytes per second of
clearing.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST_HEAP_BLOCK = 32 << 20  # bytes; glibc refuses a higher mmap threshold on 64-bit machines


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse blocks up to 32 MiB instead of returning them. False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK) and mallopt(M_TRIM_THRESHOLD, 1 << 30))
