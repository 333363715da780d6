"""How many cores there are."""

import os

# Up to so many cores, a process that spins takes the time that the others need.
FEW_CORES = 4


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def few_cores() -> bool:
    return cores() <= FEW_CORES
