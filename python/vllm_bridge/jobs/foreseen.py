"""What a step of a job would take: disk, memory and time. Imports no torch.

Time is counted in seconds that a processor works, which other processes do not change, on the
machine that the figures of this package were measured on. How long that takes here is a range: at
the least where nothing else runs, at the most where all that runs now goes on.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any, Final

from vllm_bridge import machine
from vllm_bridge.jobs.modesty import NICE

# What the work of ``_probe`` took on the machine that the figures were measured on, in seconds.
_PROBE: Final = 0.02

# How far the work itself may be from what is foreseen of it.
_LESS, _MORE = 0.6, 2.0


@dataclasses.dataclass(frozen=True)
class Foreseen:
    """What a step would take.

    Args:
        bytes: of the files that it makes
        disk: of these, and of those that are there only meanwhile
        memory: the most of it, in bytes
        minutes: from and to
    """

    bytes: int
    disk: int
    memory: int
    minutes: tuple[float, float]

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def together(each: Sequence[Foreseen], others: tuple[float, float] = (0.0, 0.0)) -> Foreseen:
    """Of a job: outputs are made one after the other, and what is between them is kept until all
    are there.

    Args:
        others: the minutes of steps that make nothing
    """
    if not each:
        return Foreseen(0, 0, 0, (0.0, 0.0))
    size = sum(one.bytes for one in each)
    minutes = [*(one.minutes for one in each), others]
    return Foreseen(
        size,
        size + max(one.disk - one.bytes for one in each),
        max(one.memory for one in each),
        (
            round(sum(least for least, _most in minutes), 2),
            round(sum(most for _least, most in minutes), 2),
        ),
    )


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this machine has for one more process.

    Args:
        speed: of a core at its best and at its worst, against that of the machine that was
            measured
        cores: that the process computes with at the most
        share: of one core, that it gets while all that runs now goes on
    """

    speed: tuple[float, float] = (1.0, 1.0)
    cores: int = 1
    share: float = 1.0

    def minutes(self, serial: float, parallel: float) -> tuple[float, float]:
        """How long work takes.

        Args:
            serial: seconds of it that one core does after the other, as imports are
            parallel: seconds of it that several cores share
        """
        best, worst = self.speed
        least = (serial + parallel / self.cores) / best * _LESS
        most = (serial + parallel) / worst / self.share * _MORE
        return (round(least / 60, 2), round(most / 60, 2))


def here() -> Machine:
    """This machine, as it is now. Takes a fifth of a second where it is idle."""
    cores = machine.cores()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    # What others do at the time takes from the caches and the clock of a core.
    took = [_probe() for _ in range(15)]
    return Machine(
        (_PROBE / min(took), _PROBE / max(took)),
        min(cores, int(threads)) if threads.isdecimal() and int(threads) > 0 else cores,
        share(cores, os.getloadavg()[0], int(os.environ.get(NICE, "0"))),
    )


def share(cores: int, load: float, nice: int) -> float:
    """What one more process gets of one core.

    Args:
        load: how many others want to run, of the usual urgency
        nice: how much less urgent this one is; each step weighs a fifth less
    """
    weight = 1.25**-nice
    return min(1.0, max(cores - load, cores * weight / (load + weight)))


def _probe() -> float:
    """Seconds of this thread for a little of what jobs do: products of matrices, passes over
    numbers, and Python."""
    import numpy

    matrix = numpy.full((64, 64), 0.5, numpy.float32)
    numbers = numpy.full(1 << 18, 0.5, numpy.float32)
    began = time.thread_time()
    for _ in range(64):
        matrix @ matrix
    for _ in range(16):
        numpy.sqrt(numbers * numbers + numbers)
    sum(number * number for number in range(40_000))
    return max(time.thread_time() - began, 1e-6)
