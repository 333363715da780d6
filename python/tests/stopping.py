"""The end of an engine that a test has started in its own process."""

import contextlib
import os
from typing import Any

import psutil

from vllm_bridge import guard


def stop(core: Any) -> None:
    """Ends what has a ``shutdown`` of vLLM's: an AsyncLLM, or the client of an EngineCore.

    On a busy machine vLLM kills what takes its time, and asks for the names of processes that may
    be gone by then. Ranks leave their shared memory, which no guard removes here; tests that run
    beside these ones look for what nobody holds.
    """
    segments = guard.segments()
    children = [child.pid for child in psutil.Process().children(recursive=True)]
    of_engines = guard.held(set(segments), children) - guard.held(set(segments), [os.getpid()])
    with contextlib.suppress(psutil.NoSuchProcess):
        core.shutdown()
    guard.remove_segments({inode: segments[inode] for inode in of_engines})
