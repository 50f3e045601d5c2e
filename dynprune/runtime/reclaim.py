"""Gives memory that the process has freed back to the system."""

from __future__ import annotations

import ctypes
import gc


def return_freed_memory() -> None:
    """Collects unreachable objects and hands the allocator's free pages to the system, where the C library can (glibc's `malloc_trim`)."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    trim(0)
