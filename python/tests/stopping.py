"""The end of an engine that a test has started in its own process."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import psutil

SHARED_MEMORY = Path("/dev/shm")


def stop(core: Any) -> None:
    """Ends what has a ``shutdown`` of vLLM's: an AsyncLLM, or the client of an EngineCore.

    On a busy machine vLLM kills what takes its time, and asks for the names of processes that may
    be gone by then. Ranks leave their shared memory, which no guard removes here; tests that run
    beside these ones look for what nobody holds.
    """
    children = psutil.Process().children(recursive=True)
    of_engines = {inode for child in children for inode in _mapped(child.pid)}
    with contextlib.suppress(psutil.NoSuchProcess):
        core.shutdown()
    left = of_engines - _mapped(os.getpid())
    for segment in SHARED_MEMORY.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if segment.stat().st_ino in left:
                segment.unlink()


def _mapped(pid: int) -> set[int]:
    """The segments that a process uses. By inode: a semaphore is mapped under another name."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {int(inode) for inode in re.findall(rf"(\d+)\s+{SHARED_MEMORY}/", maps)}
