"""A long task of a job: it runs in a thread, so that the worker still hears when it is to end, and
tells how far it is.
"""

import asyncio
import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vllm_bridge.errors import BridgeError
from vllm_bridge.rpc.call import Call

# Seconds from one sign of life to the next, where the task has nothing new to tell.
HEARTBEAT = 5.0

# Seconds between two messages of a task that tells more than anybody can read.
PAUSE = 0.1

R = TypeVar("R")


class Telling:
    """Tells the process that waits how far a task is. Called from any thread.

    ``tell(phase, done, total, **figures)``: ``phase`` names what is done now (``"layers"``,
    ``"writing"``, …), ``done`` of ``total`` parts of it are. The time that is left of the phase is
    told too. ``figures`` are what else there is to tell, under names of their own: ``bytes`` and
    ``total_bytes``, ``loss``, …
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._last: dict[str, Any] = {"phase": "starting"}
        self._began = (time.monotonic(), 0)
        self._told = 0.0

    def __call__(
        self, phase: str, done: int | None = None, total: int | None = None, **figures: Any
    ) -> None:
        now = time.monotonic()
        new = phase != self._last["phase"]
        if new:
            self._began = (now, done or 0)
        self._last = {
            "phase": phase,
            "done": done,
            "total": total,
            "seconds_left": self._seconds_left(now, done, total),
            **figures,
        }
        # What begins and what ends is always told.
        if new or done == total or now - self._told >= PAUSE:
            self._told = now
            self._loop.call_soon_threadsafe(self._send, self._last)

    def _seconds_left(self, now: float, done: int | None, total: int | None) -> float | None:
        began, from_done = self._began
        if not done or not total or done <= from_done:
            return None
        return round((now - began) / (done - from_done) * (total - done), 1)

    def again(self) -> None:
        """Tells the same once more."""
        self._send(self._last)

    def _send(self, told: dict[str, Any]) -> None:
        self._call.notify("progress", {"id": self._call.id, **told})


async def run(call: Call, task: Callable[[Telling], R]) -> R:
    """What ``task`` returns, which is given what tells its progress.

    It says now and then that it is alive. A full disk and want of memory are errors of their own.
    """
    tell = Telling(call)
    # Before the thread can: what it tells first would be told twice, and before its turn.
    tell.again()
    beating = asyncio.create_task(_beat(tell))
    try:
        with told_apart():
            return await asyncio.to_thread(task, tell)
    finally:
        beating.cancel()


async def _beat(tell: Telling) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT)
        tell.again()


@contextmanager
def told_apart() -> Iterator[None]:
    """Makes errors of what the machine lacks that say so."""
    try:
        yield
    except MemoryError as error:
        raise BridgeError(
            "out_of_memory",
            "There is not enough memory for this step.",
            remedy="Stop engines that hold it, or take a larger machine.",
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BridgeError(
            "disk_full",
            f"The disk is full: {error.filename or 'a file'} could not be written.",
            remedy="Make room, then retry the job: it goes on at the output that it was at.",
        ) from error
