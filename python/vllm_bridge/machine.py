"""What there is of the machine: its cores, and memory that is given back to it."""

import ctypes
import os

# Up to so many cores, a process that spins takes the time that the others need.
FEW_CORES = 4


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def few_cores() -> bool:
    return cores() <= FEW_CORES


def give_back() -> None:
    """Gives the system what is free of this process' heap. What a large tensor was computed with is
    kept there where small ones that stay lie behind it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
