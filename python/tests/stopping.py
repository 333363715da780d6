"""The end of an engine that a test has started in its own process."""

import contextlib
from typing import Any

import psutil


def stop(core: Any) -> None:
    """Ends what has a ``shutdown`` of vLLM's: an AsyncLLM, or the client of an EngineCore.

    On a busy machine vLLM kills what takes its time, and asks for the names of processes that may
    be gone by then.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        core.shutdown()
