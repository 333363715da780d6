"""Whether an engine moves, for telling one that hangs from one that has much to do.

Two figures show it. A *step* is one message from vLLM's EngineCore: outputs, or figures of a step
without any. One step of a long prompt may take minutes on a slow device, so there are *beats* too:
in each of vLLM's processes a thread looks twice a second where the main thread is, the one that
schedules or computes, and counts each time that it is at another place than before. A process
that computes goes through its layers; one that was stopped, waits for a lock or for another
process, or sits in a kernel that does not end, stays where it is.

The count is a file in the run folder, which the worker reads when Elixir asks.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

LOOK_SECONDS = 0.5

_PREFIX = "heartbeat."
_COUNT_BYTES = 8


def start() -> None:
    """Begins to count in a process of vLLM's; in others it does nothing."""
    run = os.environ.get("EX_VLLM_RUN")
    if run is None or multiprocessing.parent_process() is None:
        return
    path = _folder(run) / f"{_PREFIX}{os.getpid()}"
    with contextlib.suppress(FileExistsError):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        threading.Thread(target=_count, args=(file,), name="heartbeat", daemon=True).start()


class Heartbeat:
    """The figures of one engine."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._steps = 0
        run = os.environ.get("EX_VLLM_RUN")
        self._folder = None if run is None else _folder(run)
        receive = llm.engine_core.get_output_async

        async def counted() -> Any:
            outputs = await receive()
            self._steps += 1
            return outputs

        # vLLM's handler of outputs looks this up before each message.
        llm.engine_core.get_output_async = counted

    def read(self) -> dict[str, int]:
        return {
            "steps": self._steps,
            "beats": self._beats(),
            "unfinished": self._llm.output_processor.get_num_unfinished_requests(),
        }

    def _beats(self) -> int:
        if self._folder is None:
            return 0
        return sum(_read(path) for path in self._folder.glob(f"{_PREFIX}*"))


def _folder(run: str) -> Path:
    return Path(run, "tmp")


def _read(path: Path) -> int:
    with contextlib.suppress(OSError):
        return int.from_bytes(path.read_bytes(), "little")
    return 0


def _count(file: int) -> None:
    main = threading.main_thread().ident
    beats, place = 0, 0
    while True:
        time.sleep(LOOK_SECONDS)
        frame = sys._current_frames().get(main or 0)
        now = _place(frame)
        del frame
        if now != place:
            beats, place = beats + 1, now
            os.pwrite(file, beats.to_bytes(_COUNT_BYTES, "little"), 0)


def _place(frame: FrameType | None) -> int:
    """Where a thread is: in which instruction of which function, called from where."""
    places = []
    while frame is not None:
        places.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return hash(tuple(places))
