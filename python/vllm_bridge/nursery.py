"""``python -m vllm_bridge nursery``: a process that has imported what workers need and forks them.

Imports are nearly all that a worker of a small model does before it serves. This process does
them once. It listens on a socket in its run folder; a port program (see ``guard.py``) hands it the
descriptors and the environment of a run, and it forks a guard, which forks the worker. From there
on everything is as if both had been started, but for the memory that they share with this process.

It runs no operator, touches no device and has one thread, for what it has would be in its
children half; where that is not so, it takes no runs, and the port program starts a worker itself.
"""

import contextlib
import gc
import importlib
import logging
import os
import select
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from vllm_bridge import forking, guard

logger = logging.getLogger(__name__)

SOCKET = "nursery"

# How long a port program may take to say all that a run needs.
HAND_OVER_LIMIT_S = 5.0

# What a worker and vLLM's processes import sooner or later, whatever the model.
MODULES: Sequence[str] = (
    "vllm_bridge.engine_methods",
    "vllm_bridge.engine.start",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.model_loader",
    "vllm.renderers.online_renderer",
)

# And by vLLM's name of the device.
WORKERS = {"cpu": "vllm.v1.worker.cpu_worker", "cuda": "vllm.v1.worker.gpu_worker"}


def main(work: Callable[[], None]) -> None:
    """Serves until it is killed.

    Args:
        work: what a worker does
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(os.environ["TMPDIR"], SOCKET))
    listener.listen(socket.SOMAXCONN)
    load()
    # What is here stays; that it is not looked through again leaves its memory shared.
    gc.collect()
    gc.freeze()
    logger.info("ready to fork workers")
    serve(listener, work)


def load() -> None:
    """Imports what workers need."""
    for name in MODULES:
        importlib.import_module(name)
    platforms = sys.modules.get("vllm.platforms")
    worker = platforms and WORKERS.get(platforms.current_platform.device_type)
    if worker:
        importlib.import_module(worker)


def serve(listener: socket.socket, work: Callable[[], None]) -> None:
    """Forks a guard for each run that is handed over."""
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    guards: dict[int, int] = {}
    while True:
        for fd, _event in poller.poll():
            if fd in guards:
                poller.unregister(fd)
                os.waitpid(guards.pop(fd), 0)
                os.close(fd)
                continue
            connection, _address = listener.accept()
            with connection:
                pid = None
                with contextlib.suppress(OSError, ValueError):
                    pid = take(connection, work)
            if pid is not None:
                end = os.pidfd_open(pid)
                guards[end] = pid
                poller.register(end, select.POLLIN)


def take(connection: socket.socket, work: Callable[[], None]) -> int | None:
    """Forks the guard of one run; its process id, or None where forking would not be safe. (The
    guard ends at once where that shows only later.)"""
    if not forking.is_safe():
        return None
    # One that was stopped meanwhile must not keep the others waiting.
    connection.settimeout(HAND_OVER_LIMIT_S)
    header, fds, _flags, _from = socket.recv_fds(connection, guard.LENGTH_BYTES, len(DESCRIPTORS))
    try:
        with connection.makefile("rb") as stream:
            message = stream.read(int.from_bytes(header, "big"))
        run, folder, owner, *variables = os.fsdecode(message).split("\0")
        environment = dict(variable.split("=", 1) for variable in variables)
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        starter = os.pidfd_open(struct.unpack("3i", peer)[0])
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    # A run that was begun cannot be handed back.
                    if forking.was_safe(os.getppid()):
                        become_guard(
                            connection, fds, starter, run, folder, environment, int(owner), work
                        )
                finally:
                    os._exit(1)
        finally:
            os.close(starter)
    finally:
        for fd in fds:
            os.close(fd)
    return pid


# The descriptors of a port program that are handed over: standard ones, and the two pipes.
DESCRIPTORS = (0, 1, 2, guard.FROM_VM, guard.TO_VM)


def become_guard(
    connection: socket.socket,
    fds: Sequence[int],
    starter: int,
    run: str,
    folder: str,
    environment: Mapping[str, str],
    owner: int,
    work: Callable[[], None],
) -> None:
    """A forked process, from its beginning to its end: the guard of a run."""
    lifeline().leave()
    forking.forget([connection.fileno(), starter, *fds])
    for fd, number in zip(fds, DESCRIPTORS, strict=True):
        os.dup2(fd, number)
    for fd in set(fds).difference(DESCRIPTORS):
        os.close(fd)
    os.setsid()
    os.chdir(folder)
    take_environment(environment)
    forking.rename(["vllm_bridge/guard.py", run], {})

    def worker(variables: Mapping[str, str]) -> None:
        forking.forget([])
        take_environment(variables)
        forking.rename(["python", "-m", "vllm_bridge"], variables)
        lifeline().join(run)
        forking.run(work)

    connection.sendall(b"+")
    code = 2
    try:
        code = guard.Guard(run, starter=starter).execute(worker, dict(environment), owner)
    except guard.Refused as error:
        print(f"guard: {error}", file=sys.stderr)
    with contextlib.suppress(OSError):
        connection.sendall(bytes([code]))
        # It may have been stopped.
        signal.pidfd_send_signal(starter, signal.SIGCONT)
    os._exit(code)


def lifeline() -> ModuleType:
    return sys.modules["sitecustomize"]


def take_environment(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # Looked up once, and the nursery's until now.
