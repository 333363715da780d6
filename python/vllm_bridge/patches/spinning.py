"""Readers of shared memory nap where cores are few.

A reader that has had a message within the last second yields in a tight loop until the next one.
On few cores that starves the other ranks and the event loop for tens of milliseconds at a time, and
a nap of microseconds cures it. What happens after the busy second (sleeping on a socket until there
is a notification) stays vLLM's.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

from vllm_bridge.machine import few_cores
from vllm_bridge.patches import replace

SEEN = ("0.31.", "0.32.")
TOUCHES = {"vllm.distributed.device_communicators.shm_broadcast": ("SpinCondition.wait",)}

# How long a reader sleeps before it looks again.
NAP_SECONDS = 20e-6


def apply() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    if few_cores():
        replace(SpinCondition, "wait", napping)


def napping(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() <= self.last_read + self.busy_loop_s:
            time.sleep(NAP_SECONDS)
        else:
            original(self, timeout_ms)

    return wait
