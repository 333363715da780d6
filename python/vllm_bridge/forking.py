"""vLLM's processes, forked from one that has imported vLLM instead of started anew.

vLLM starts its engine core, and a process for each of several devices, with multiprocessing's
*spawn*: an interpreter that imports torch and vLLM once more, which takes longer than all else that
it does to begin. Here the worker forks a *seed* right after its own imports, while it has one
thread and has run no operator, and the seed forks what vLLM asks for. It does what
multiprocessing's own fork server does, which would be started and import vLLM, too.

What a process reads when a library is loaded cannot be changed after it (where OpenMP puts its
threads, say). A process whose environment differs in such a variable is spawned as ever.
"""

import asyncio
import contextlib
import ctypes
import io
import logging
import os
import pickle
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import (
    context,
    popen_fork,
    popen_spawn_posix,
    process,
    reduction,
    resource_tracker,
    spawn,
    util,
)
from multiprocessing.process import BaseProcess
from typing import Any

from vllm_bridge import guard

logger = logging.getLogger(__name__)

# Variables that libraries read while they are loaded, by how their names begin.
READ_ON_IMPORT = (
    "CUDA_", "GOMP_", "HF_", "HIP_", "KMP_", "LD_", "MALLOC_", "MKL_", "NCCL_", "OMP_", "PYTHON",
    "TCMALLOC_", "TORCH", "TRANSFORMERS_",
)  # fmt: skip

# But not these: torch sets it, and looks it up each time.
READ_LATER = {"TORCHINDUCTOR_CACHE_DIR"}

PR_SET_NAME = 15

# File descriptors that one message can carry.
_MAX_FDS = 250

# A process id or an exit code on its way from the seed.
_NUMBER_BYTES = 8


class Seed:
    """A process that forks.

    Args:
        requests: where clients ask it for a process
    """

    def __init__(self, requests: socket.socket) -> None:
        self.requests = requests
        self.environment = dict(os.environ)
        self.executable = spawn.get_executable()

    def ask(self, fds: Sequence[int]) -> tuple[int, int]:
        """Has a process forked that gets ``fds`` and writes where this one does. Returns a
        descriptor to read its id and at last its exit code from, and one to write its work to."""
        status, status_w = os.pipe()
        work_r, work = os.pipe()
        tracker = resource_tracker.getfd()
        assert tracker is not None  # noqa: S101 - it has just been started
        try:
            socket.send_fds(self.requests, [b"fork"], [work_r, status_w, 1, 2, tracker, *fds])
        except BaseException:
            os.close(status)
            os.close(work)
            raise
        finally:
            os.close(work_r)
            os.close(status_w)
        return status, work

    def may_fork(self) -> bool:
        """Whether a process of the present environment would be as a spawned one."""
        changed = {
            name
            for name in self.environment.keys() | os.environ.keys()
            if self.environment.get(name) != os.environ.get(name)
        }
        changed -= APPLIED.keys() | READ_LATER
        late = {name for name in changed if name.startswith(READ_ON_IMPORT)}
        if late:
            logger.info("vLLM's process is started and not forked, for %s changed", sorted(late))
        # vLLM has its processes started by another program to bind them to a NUMA node.
        return not late and spawn.get_executable() == self.executable


_seed: Seed | None = None


def start() -> bool:
    """Forks the seed of this process, which must have imported vLLM, and has vLLM take its
    processes from there. Returns whether there is one; there is none where forking is not safe."""
    global _seed
    if _seed is not None or not is_safe():
        return _seed is not None
    requests, client = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner = os.pidfd_open(os.getpid())
    _seed = Seed(client)
    pid = os.fork()
    if pid == 0:
        try:
            _serve(requests, client, owner)
        finally:
            os._exit(1)
    os.close(owner)
    requests.close()
    if was_safe():
        _install()
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _seed = None
    return _seed is not None


def is_safe() -> bool:
    """Whether this process may be forked: nobody else runs in it, and no device is in use."""
    torch = sys.modules.get("torch")
    return threading.active_count() == 1 and not (torch is not None and torch.cuda.is_initialized())


def was_safe(forked: int | None = None) -> bool:
    """Whether no thread was there, Python's or not, when this process, or the one of that id, was
    just forked. OpenBLAS, which NumPy and SciPy bring, has its threads end before and starts them
    when they are needed."""
    return len(os.listdir(f"/proc/{forked or 'self'}/task")) == 1


def _install() -> None:
    """Has vLLM's modules take processes from the seed."""
    from vllm.utils import system_utils

    original = system_utils.get_mp_context
    seeded = _Context()

    def get_mp_context() -> context.BaseContext:
        own: context.BaseContext = original()  # which sets variables that its processes inherit
        return seeded if own.get_start_method() == "spawn" else own

    for module in list(sys.modules.values()):
        # Not by getattr: some modules import others when they are asked for a name.
        if vars(module).get("get_mp_context") is original:
            vars(module)["get_mp_context"] = get_mp_context


class _Popen(popen_fork.Popen):
    """Starts a process through the seed; as multiprocessing's ``popen_forkserver``."""

    method = "spawn"

    class DupFd:
        def __init__(self, index: int) -> None:
            self.index = index

        def detach(self) -> int:
            return _inherited[self.index]

    def __init__(self, process_obj: BaseProcess) -> None:
        self._fds: list[int] = []
        super().__init__(process_obj)

    def duplicate_for_child(self, fd: int) -> int:
        self._fds.append(fd)
        return len(self._fds) - 1

    def _launch(self, process_obj: BaseProcess) -> None:
        assert _seed is not None  # noqa: S101 - a fault of ours
        work = io.BytesIO()
        preparation = spawn.get_preparation_data(process_obj.name)
        context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            reduction.dump((dict(os.environ), preparation), work)
            reduction.dump(process_obj, work)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, work_w = _seed.ask(self._fds)
        # The child sees by its other end that this process is gone.
        parent_w = os.dup(work_w)
        self.finalizer = util.Finalize(self, _close, (parent_w, self.sentinel))
        with open(work_w, "wb") as file:
            file.write(work.getbuffer())
        self.pid = _read_number(self.sentinel)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            poller = select.poll()
            poller.register(self.sentinel, select.POLLIN)
            if not poller.poll(0 if flag == os.WNOHANG else None):
                return None
            try:
                self.returncode = _read_number(self.sentinel)
            except (OSError, EOFError):
                self.returncode = 255  # the seed was killed
        return self.returncode


class _Process(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        if _seed is not None and _seed.may_fork():
            return _Popen(process_obj)
        return popen_spawn_posix.Popen(process_obj)


class _Context(context.SpawnContext):
    Process = _Process


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


# What a forked process was given by its parent.
_inherited: Sequence[int] = ()


def _serve(requests: socket.socket, client: socket.socket, owner: int) -> None:
    """The seed: forks what is asked for, until its owner ends."""
    _install()
    # Each of vLLM's processes loads its plugins, whatever this one has loaded.
    if plugins := sys.modules.get("vllm.plugins"):
        vars(plugins)["plugins_loaded"] = False
    forget([requests.fileno(), client.fileno(), owner])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rename(["vllm_bridge", "seed"])
    poller = select.poll()
    poller.register(owner, select.POLLIN)
    poller.register(requests, select.POLLIN)
    children: dict[int, tuple[int, int]] = {}
    while True:
        for fd, _event in poller.poll():
            if fd == owner:
                os._exit(0)
            elif fd in children:
                poller.unregister(fd)
                pid, status = children.pop(fd)
                _report(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(status)
                os.close(fd)
            else:
                _message, fds, _flags, _from = socket.recv_fds(requests, 16, _MAX_FDS)
                work, status, *given = fds
                pid = os.fork()
                if pid == 0:
                    requests.close()
                    unused = [owner, status, *children]
                    unused += [status for _pid, status in children.values()]
                    os._exit(_work(work, given, unused))
                _report(status, pid)
                end = os.pidfd_open(pid)
                children[end] = (pid, status)
                poller.register(end, select.POLLIN)
                for fd in (work, *given):
                    os.close(fd)


def forget(kept: Iterable[int]) -> None:
    """Leaves a forked process what it would have if it had been started: no event loop, no handlers
    of signals, and of descriptors those that a program inherits, those in ``kept``, and its hold of
    the guard's lifeline."""
    asyncio._set_running_loop(None)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDWR)
    keep = {nothing, getattr(sys.modules.get("sitecustomize"), "lifeline", None), *kept}
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        with contextlib.suppress(OSError):
            if fd not in keep and not os.get_inheritable(fd):
                # Not closed: objects that believe to own the number would close what has it next.
                os.dup2(nothing, fd, inheritable=False)


def rename(arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    """Has the system tell these arguments of this process, and these variables, as far as there is
    room. The one by which guards and sweeps know a run's processes comes first, then what is not
    known yet."""
    fields = guard.read_proc(os.getpid(), "stat").rpartition(b")")[2].split()
    _overwrite(fields[45:47], arguments)
    if variables is not None:
        known = set(os.fsdecode(guard.read_proc(os.getpid(), "environ")).split("\0"))
        strings = [f"{name}={value}" for name, value in variables.items()]
        tag = f"{guard.RUN_VARIABLE}="
        strings.sort(key=lambda string: (not string.startswith(tag), string in known))
        _overwrite(fields[47:49], strings)


def _overwrite(region: Sequence[bytes], strings: Iterable[str]) -> None:
    start, end = map(int, region)
    text = b""
    for string in strings:
        added = text + os.fsencode(string) + b"\0"
        if len(added) > end - start:
            break
        text = added
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _set_title(title: str) -> None:
    """``setproctitle``, which looks for the arguments that an interpreter was started with, and in
    a process whose variables were changed does not find them."""
    rename([title])
    name = ctypes.create_string_buffer(os.fsencode(title))
    guard.prctl(PR_SET_NAME, ctypes.addressof(name))


def _take_titles() -> None:
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle = _set_title


def run(work: Callable[[], None]) -> None:
    """Does a forked process's work and ends the process as an interpreter ends."""
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _work(work: int, given: Sequence[int], unused: Sequence[int]) -> int:
    """A process that the seed has forked, from its beginning to its exit code."""
    global _inherited
    try:
        for fd in unused:
            os.close(fd)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output, errors, tracker, *_inherited = given
        for fd, standard in ((output, 1), (errors, 2)):
            os.dup2(fd, standard)
            os.close(fd)
        resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]
        parent = os.dup(work)
        current = process.current_process()
        with open(work, "rb") as file:
            current._inheriting = True  # type: ignore[attr-defined]
            try:
                # From the worker or another of its processes, as with any of multiprocessing's.
                variables, preparation = pickle.load(file)  # noqa: S301
                _apply(variables)
                spawn.prepare(preparation)
                process_obj = pickle.load(file)  # noqa: S301
                rename(["vllm_bridge", process_obj.name], variables)
                _take_titles()
            finally:
                del current._inheriting  # type: ignore[attr-defined]
        code: int = process_obj._bootstrap(parent)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
    return code


def _apply(variables: Mapping[str, str]) -> None:
    """Gives a forked process the environment that it would have been started with."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    for name, apply in APPLIED.items():
        value = variables.get(name)
        if value is not None and value != before.get(name):
            apply(value)


def _limit_threads(value: str) -> None:
    import torch

    if value.isdigit():
        torch.set_num_threads(int(value))


def _stay_offline(value: str) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = value.upper() in constants.ENV_VARS_TRUE_VALUES


# Variables that are read on import, and what has the same effect later.
APPLIED: Mapping[str, Callable[[str], None]] = {
    "OMP_NUM_THREADS": _limit_threads,
    "HF_HUB_OFFLINE": _stay_offline,
}


def _report(fd: int, number: int) -> None:
    # Nobody may be there to read it any more.
    with contextlib.suppress(BrokenPipeError):
        os.write(fd, number.to_bytes(_NUMBER_BYTES, "little", signed=True))


def _read_number(fd: int) -> int:
    data = os.read(fd, _NUMBER_BYTES)
    if len(data) != _NUMBER_BYTES:
        raise EOFError("the seed ended")
    return int.from_bytes(data, "little", signed=True)
