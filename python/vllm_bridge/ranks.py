"""The processes that a model is split over end together, and at once.

When one of them dies, vLLM first asks the others to end and says so afterwards. On a CPU they wait
for the dead one, within a kernel where no signal is heard, so that callers hear of it after ten
seconds. Here the engine core kills them and ends, which its parent sees at once.
"""

import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

logger = logging.getLogger(__name__)


def install() -> None:
    """Has the executor of this process, if there is one, watch over its ranks so."""
    module = sys.modules.get("vllm.v1.executor.multiproc_executor")
    if module is None:
        return
    original = module.MultiprocExecutor.start_worker_monitor
    if original.__module__ == __name__:
        return

    def start_worker_monitor(self: Any, inline: bool = False) -> None:
        # Who waits for the end of the ranks, or can do without some, does as vLLM does.
        if inline or self.parallel_config.enable_fault_tolerance:
            original(self, inline)
            return
        ranks = [worker.proc for worker in self.workers]
        arguments = (weakref.ref(self), ranks)
        threading.Thread(target=watch, args=arguments, name="ranks", daemon=True).start()

    module.MultiprocExecutor.start_worker_monitor = start_worker_monitor


def watch(executor: weakref.ref[Any], ranks: Sequence[BaseProcess]) -> None:
    """Ends this process and its ranks with the first of them, unless they are being ended."""
    connection.wait([rank.sentinel for rank in ranks])
    owner = executor()
    if owner is None or getattr(owner, "shutting_down", False):
        return
    for rank in ranks:
        if (code := rank.exitcode) is None:
            rank.kill()
        else:
            logger.error("the rank %s died: %s", rank.name, ended(code))
    os._exit(1)


def ended(code: int) -> str:
    """How a process ended, by its exit code as Python has it."""
    if code >= 0:
        return f"status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
