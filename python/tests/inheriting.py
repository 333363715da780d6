"""What is prepared once for all engines of a process, which are forked."""

import atexit
import gc
import sys

import zmq

from vllm_bridge import nursery


def prepare() -> None:
    """Imports what engines need, and leaves it out of every later search for garbage.

    That search goes through all that was imported, in each engine several times, and every object
    that it looks at is copied from its parent first: three seconds of four that an engine of the
    demo model takes.
    """
    nursery.load()
    gc.collect()
    gc.freeze()
    # At the end of this process, which complains of what it cannot free.
    atexit.register(gc.unfreeze)
    # vLLM freezes what an engine has when it has started, and has all looked through again when
    # it ends.
    vars(gc).update(freeze=lambda: None, unfreeze=lambda: None)
    # What a test that fails leaves of its engine is found when garbage is looked for: the context
    # of its sockets would wait for them for good, and the run with it.
    zmq.Context.__del__ = lambda _context: None  # type: ignore[method-assign]
    # Of the engines of this process each has its own environment.
    vars(sys.modules["vllm.envs"]).update(enable_envs_cache=lambda: None)
