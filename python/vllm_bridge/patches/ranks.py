"""The processes that a model is split over end together, and at once.

When one of them dies, vLLM first asks the others to end and says so afterwards. On a CPU they wait
for the dead one, within a kernel where no signal is heard, so that callers hear of it after ten
seconds. Here the engine core kills them and ends, which its parent sees at once.

That goes for ranks that serve and for those that load.
"""

import functools
import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from vllm_bridge.patches import replace

logger = logging.getLogger(__name__)

SEEN = ("0.31.", "0.32.")
TOUCHES = {
    "vllm.v1.executor.multiproc_executor": (
        "MultiprocExecutor.start_worker_monitor",
        "WorkerProc.wait_for_ready",
    )
}

# How long a process that is dying may take to be dead.
PATIENCE_SECONDS = 1.0


def apply() -> None:
    """Has the executor of this process, if there is one, watch over its ranks so."""
    module = sys.modules.get("vllm.v1.executor.multiproc_executor")
    if module is not None:
        replace(module.MultiprocExecutor, "start_worker_monitor", watching)
        replace(module.WorkerProc, "wait_for_ready", ending)


def watching(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def start_worker_monitor(self: Any, inline: bool = False) -> None:
        # Who waits for the end of the ranks, or can do without some, does as vLLM does.
        if inline or self.parallel_config.enable_fault_tolerance:
            original(self, inline)
            return
        ranks = [worker.proc for worker in self.workers]
        arguments = (weakref.ref(self), ranks)
        threading.Thread(target=watch, args=arguments, name="ranks", daemon=True).start()

    return start_worker_monitor


def ending(original: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
    @functools.wraps(original)
    def wait_for_ready(loading: Sequence[Any]) -> Any:
        try:
            return original(loading)
        except Exception:
            # One has ended, and said why if it could.
            end([worker.proc for worker in loading])
            os._exit(1)

    return wait_for_ready


def watch(executor: weakref.ref[Any], ranks: Sequence[BaseProcess]) -> None:
    """Ends this process and its ranks with the first of them, unless they are being ended."""
    connection.wait([rank.sentinel for rank in ranks])
    owner = executor()
    if owner is None or getattr(owner, "shutting_down", False):
        return
    end(ranks)
    os._exit(1)


def end(ranks: Sequence[BaseProcess]) -> None:
    """Ends these ranks, of which one is dead or dying."""
    dying = connection.wait([rank.sentinel for rank in ranks], PATIENCE_SECONDS)
    for rank in ranks:
        if rank.sentinel in dying:
            # The system closes what a process had open before it says how the process ended.
            rank.join(PATIENCE_SECONDS)
        if (code := rank.exitcode) is None:
            rank.kill()
        else:
            logger.error("the rank %s died: %s", rank.name, ended(code))


def ended(code: int) -> str:
    """How a process ended, by its exit code as Python has it."""
    if code >= 0:
        return f"status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
