"""Tie every Python process of a worker's tree to the guard that watches over the tree.

Python imports this module at the start of every interpreter that finds it on its path, as all
processes of a worker do. Outside a run (EX_VLLM_RUN is not set) it does nothing.

While the guard lives, it ends whatever the tree started. Should the guard be killed, each process
must end by itself, and a parent-death signal is no help there: it comes when the *thread* that
started the process ends, which libraries that start processes from short-lived threads would feel
at once. So the processes hold the guard's lifeline instead, a FIFO that only the guard has open
for writing. When the guard is gone, however it went, the kernel sends SIGKILL to everybody who
holds the reading end: at once, to stopped processes and processes in sessions of their own too.

A process that cannot take hold of the lifeline has no guard any more (its run is over) and ends
with status 1. Not covered are other programs than Python, which a sweep finds by their environment
(see ``vllm_bridge.guard``), and interpreters started with ``-I``, ``-E`` or ``-S``.

A sitecustomize further down the path, as some distributions have, runs after this one.
"""

import fcntl
import os
import sys
from importlib.machinery import PathFinder

_SIGKILL = 9  # As everywhere on Linux; the signal module would take longer than all else here.

# The run that this process belongs to, and the descriptor by which it holds the lifeline.
run: str | None = None
lifeline: int | None = None


def join(new_run: str) -> None:
    """Ties this process, and what it forks from now on, to the guard of a run."""
    global run, lifeline
    run, lifeline = new_run, _hold_lifeline(new_run)


def leave() -> None:
    """Unties this process: it becomes a guard itself."""
    global run, lifeline
    if lifeline is not None:
        os.close(lifeline)
    run = lifeline = None


def _after_fork() -> None:
    # The signal goes to the process that asked for it only: a child asks for its own.
    if run is None or lifeline is None:
        return
    inherited = lifeline
    join(run)
    try:
        # By now the number may be another file's.
        if os.path.samestat(os.fstat(inherited), os.fstat(lifeline)):
            os.close(inherited)
    except OSError:
        pass


def _hold_lifeline(of: str) -> int:
    try:
        fd = os.open(os.path.join(of, "alive"), os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETSIG, _SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        # A hang-up before the last call gave no signal, but it shows as an end of file.
        os.read(fd, 1)
        reason = "it has ended"
    except BlockingIOError:
        return fd  # Nothing to read, and someone is there who could write: the guard lives.
    except OSError as error:
        reason = str(error)
    os.write(2, f"sitecustomize: no guard for {of}: {reason}\n".encode(errors="replace"))
    os._exit(1)


def _run_next() -> None:
    here = os.path.dirname(os.path.realpath(__file__))
    path = [folder for folder in sys.path if os.path.realpath(folder) != here]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec and spec.loader:
        module = type(sys)("sitecustomize")
        module.__file__ = spec.origin
        module.__spec__ = spec
        spec.loader.exec_module(module)


if "EX_VLLM_RUN" in os.environ:
    join(os.environ["EX_VLLM_RUN"])
os.register_at_fork(after_in_child=_after_fork)
_run_next()
