"""The port program: parent, watcher and undertaker of one worker. Linux, standard library only.

    python3 -I -S guard.py [--alone | --nursery SOCKET] RUN_DIR -- PROGRAM ARGS...
    python3 -I -S guard.py --end RUN_DIR
    python3 -I -S guard.py --sweep BASE_DIR
    python3 -I -S guard.py --witness RUN_DIR OWNER_PID

The guard starts PROGRAM, waits for its end or for the end of whoever opened the port, and then
leaves nothing behind: no process of the tree, no shared memory, no temporary file. It is run by
path, outside its package, so that it starts at once and works in any environment.

The port. The worker inherits file descriptors 3 (from the Erlang VM) and 4 (to it) and speaks the
protocol on them. The guard never reads or writes either; of 3 it asks the kernel only whether the
other end is still open, of 4 it keeps no copy.

The run folder. RUN_DIR is used for one run only and belongs to it alone (mode 0700; created if
missing). Its path has at most 66 bytes, because sockets below it must fit into ``sun_path``.

    lock    Locked with fcntl(2), F_SETLK, for as long as the guard lives. Appears only once it is
            locked. Holds the text ``vllm_bridge PID``.
    alive   A FIFO that only the guard holds open for writing: its hang-up tells every Python
            process of the tree that the guard is gone (see ``sitecustomize``).
    log     What the tree writes to stdout and stderr, and the guard's own remarks.
    log.1   The log before the present one.
    tmp     TMPDIR and VLLM_RPC_BASE_PATH of the tree.
    clean   Empty. The guard's last act after the worker's own end: everything is gone.

The log rotates: before a write that would take it over 4 MiB, ``log`` is renamed to ``log.1``, in
place of an older one, and a new ``log`` begins. A reader remembers the inode and its offset; when
the inode of ``log`` has changed, it reads ``log.1`` from that offset to the end and goes on with
``log`` from 0. A line may be cut in two by a rotation.

How a run ends:

- The worker ends by itself, by whatever cause. The rest of the tree is killed, ``tmp`` and the
  shared memory are removed, and the guard exits with the worker's exit code, or with 128 + N when
  signal N killed it. RUN_DIR stays, with the log and ``clean``, for its owner to read and remove.
- Descriptor 3 hangs up, or the guard gets SIGTERM, SIGINT or SIGHUP. The tree is killed at once,
  RUN_DIR is removed with all the rest, and the guard exits with 0. The same happens to RUN_DIR
  when the owner disappears while a worker that ended is being cleared away.
- ``--end RUN_DIR`` has the guard of that run do the same, also one that was stopped, and waits for
  it: for a VM whose descriptor stays open until data is read that a stopped worker will never read,
  and for one whose port program was killed while its guard is another process (see below).
- PROGRAM cannot be executed: the log says why, and the exit code is 127 (an end like any other).
- The arguments, the platform, RUN_DIR or the descriptors are unusable: exit code 2 and a line on
  stderr; nothing was started.
- The guard itself is killed: the worker gets SIGKILL (PR_SET_PDEATHSIG), every other Python
  process of the tree too (``alive``). The witness does the rest.

The witness. A guard starts a second process of this program that waits for the guard's death, and
for nothing else: the guard ends it with the tree. Should the guard be killed, the witness does as
a sweep does with this one run and writes ``clean``. It removes RUN_DIR when the owner is gone or
has not done so in a minute. Should it be killed as well, a sweep does that work.

Nurseries. A *nursery* (see ``vllm_bridge.nursery``) is a program that has imported what a worker
needs and forks workers. With ``--nursery SOCKET`` this process hands its descriptors, its folder
and its environment to the one that listens there, which forks a guard that forks the worker; what
is said here of a guard is that one's doing. This process passes on its exit code, and is a plain
guard where there is no nursery. If it is killed, the guard ends the run as if descriptor 3 had hung
up.
With ``--alone`` the worker is all that the guard watches over: what it forks are runs of their own,
which survive it. That is how a nursery itself is run.

Sweeping. ``--sweep BASE_DIR`` finishes the work of guards that were killed: for every run folder
in BASE_DIR whose lock nobody holds, it kills the processes that carry this folder's
EX_VLLM_RUN in their environment, waits for the end of those that hold ``alive``, which the kernel
has killed, removes the shared memory and then the folder. A folder with
a ``clean`` younger than a minute is left to its owner, and one without our lock, which may be
anything, is never touched. A guard sweeps the folder that its own run folder is in. Sweeps of the
same folder take turns (flock on the folder). What a sweep cannot see: processes of another user,
and those that overwrote their environment (their title) and are not Python.

Shared memory. Removed are files in /dev/shm that belong to our user, appeared during the run, are
neither open nor mapped in any process that we can see, and were either held by the tree just
before it was killed or have a name of the kind that the libraries of the tree give. The second
rule is for segments whose only holder was the worker that died, and it is the only one a sweep
has. It leaves one narrow race: a program of the same user that has created a segment with such a
name and, at this moment, neither has it open nor mapped (handing it from one process to another,
or living where we cannot see it, as in another container that shares /dev/shm) loses the name.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator

FROM_VM, TO_VM = 3, 4

LOG_LIMIT = 4 * 1024 * 1024
PIPE_SIZE = 1024 * 1024
CLEAN_GRACE_S = 60.0
FREEZE_LIMIT_S = 1.0
SWEEP_LIMIT_S = 10.0
EXEC_LIMIT_S = 1.0
NURSERY_LIMIT_S = 60.0

# A socket in RUN_DIR/tmp is named by a UUID (vLLM's are), and sun_path holds 107 bytes.
RUN_DIR_LIMIT = 107 - len("/tmp/") - 36  # noqa: S108

RUN_VARIABLE = "EX_VLLM_RUN"

# Of the flags in /proc/PID/stat: a thread of the kernel.
PF_KTHREAD = 0x00200000

# Of the length of what a nursery is told.
LENGTH_BYTES = 4
LOCK_MARK = b"vllm_bridge "

SHM = "/dev/shm"  # noqa: S108
SHM_PREFIXES = (
    "psm_",  # multiprocessing.shared_memory
    "sem.mp-",  # multiprocessing's locks and semaphores
    "torch_",  # torch tensors in shared memory
    "vllm_",  # vLLM's multimodal cache and offloading regions
    "nccl-",  # NCCL's transport between processes
    "cuda.shm.",  # CUDA's inter-process communication
    "__KMP_REGISTERED_LIB_",  # LLVM's and Intel's OpenMP
)
SHM_INFIX = "-cpushm"  # vLLM's collectives on the CPU: IDENTIFIER-GROUP-[RANKS]-cpushm_RANK

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


class Refused(Exception):
    """The run cannot begin; the message says why."""


def prctl(option: int, value: int) -> None:
    if _prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# Processes


def send(pid: int, number: int) -> None:
    # Gone already, or of another user: waiting for it is all that can be done.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def read_proc(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty when the process is gone or not ours to look at."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def families() -> dict[int, list[tuple[int, str]]]:
    """The children of every process that has any, each with its state letter."""
    found: dict[int, list[tuple[int, str]]] = {}
    for pid in pids():
        # The command's name, in parentheses, may hold anything: the last one closes it.
        fields = read_proc(pid, "stat").rpartition(b")")[2].split()
        if fields:
            found.setdefault(int(fields[1]), []).append((pid, fields[0].decode()))
    return found


def children() -> dict[int, str]:
    """The children of this process, each with its state letter."""
    return dict(families().get(os.getpid(), ()))


def descendants() -> dict[int, str]:
    """The processes below this one, each with its state letter."""
    children = families()
    found: dict[int, str] = {}
    generation = [os.getpid()]
    while generation:
        below = [child for pid in generation for child in children.get(pid, ())]
        found.update(below)
        generation = [pid for pid, _state in below]
    return found


def freeze(besides: int | None) -> list[int]:
    """Stop all descendants but one, so that none can fork away or end, and return them.

    A process in state D counts as stopped: it stops before it runs another instruction of its own.
    """
    deadline = time.monotonic() + FREEZE_LIMIT_S
    while True:
        family = {pid: state for pid, state in descendants().items() if pid != besides}
        moving = False
        for pid, state in family.items():
            if state not in "TtZX":
                send(pid, signal.SIGSTOP)
                moving = moving or state != "D"
        if not moving or time.monotonic() > deadline:
            return list(family)


# Shared memory


def segments() -> dict[int, os.DirEntry[str]]:
    """The files of our user in /dev/shm by inode."""
    try:
        with os.scandir(SHM) as entries:
            return {
                entry.inode(): entry
                for entry in entries
                if entry.is_file(follow_symlinks=False) and owner(entry) == os.geteuid()
            }
    except OSError:
        return {}


def owner(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_uid
    except FileNotFoundError:
        return -1


def named_by_libraries(name: str) -> bool:
    return name.startswith(SHM_PREFIXES) or SHM_INFIX in name


def held(inodes: set[int], by: Iterable[int]) -> set[int]:
    """Those of the inodes in /dev/shm that one of the processes has mapped or open."""
    if not inodes:
        return set()
    device = os.stat(SHM).st_dev
    # How /proc/PID/maps shows it; its path would depend on the mount namespace.
    mapped_from = b" %02x:%02x " % (os.major(device), os.minor(device))
    holding: set[int] = set()
    for pid in by:
        for line in read_proc(pid, "maps").splitlines():
            _before, found, after = line.partition(mapped_from)
            if found:
                holding.add(int(after.split(None, 1)[0]))
        holding.update(open_inodes(pid, device))
    return inodes & holding


def open_inodes(pid: int, device: int) -> Iterator[int]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            # Only what is in /dev/shm by its name is looked at: a look at a file of a network
            # that is down would not return.
            if os.readlink(f"{folder}/{name}").startswith(SHM + "/"):
                found = os.stat(f"{folder}/{name}")
                if found.st_dev == device:
                    yield found.st_ino
        except OSError:
            continue


def remove_segments(candidates: dict[int, os.DirEntry[str]]) -> None:
    """Remove those of the segments that no process holds."""
    others = (pid for pid in pids() if pid != os.getpid())
    in_use = held(set(candidates), others)
    for inode, entry in candidates.items():
        if inode not in in_use:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)


# Folders


def remove_tree(path: str) -> None:
    import shutil  # Slow to import, and not needed before the end.

    shutil.rmtree(path, ignore_errors=True)


def remove_run(run: str) -> None:
    """Remove a run folder, the lock last: without it, no sweep could go on where this one ended."""
    with contextlib.suppress(FileNotFoundError):
        with os.scandir(run) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    remove_tree(entry.path)
                elif entry.name != "lock":
                    os.unlink(entry.path)
        if os.listdir(run) == ["lock"]:
            os.unlink(os.path.join(run, "lock"))
            os.rmdir(run)


# One run


class Log:
    """The bounded log of a run. A disk that is full costs lines, never the run."""

    def __init__(self, run: str) -> None:
        self.path = os.path.join(run, "log")
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.fd = os.open(self.path, flags, 0o600)
        self.size = os.fstat(self.fd).st_size

    def write(self, data: bytes) -> None:
        try:
            if self.size and self.size + len(data) > LOG_LIMIT:
                os.rename(self.path, self.path + ".1")
                full = self.fd
                self._open()
                os.close(full)
            while data:
                count = os.write(self.fd, data)
                self.size += count
                data = data[count:]
        except OSError:
            pass

    def remark(self, text: str) -> None:
        self.write(f"guard: {text}\n".encode(errors="surrogateescape"))


class Guard:
    """One run, from the run folder to the end of everything in it.

    Args:
        run: its folder
        alone: whether what the worker forks is left alone
        starter: a pidfd of the port program, where that is another process
    """

    def __init__(self, run: str, *, alone: bool = False, starter: int | None = None) -> None:
        for fd in (FROM_VM, TO_VM):
            try:
                os.fstat(fd)
            except OSError:
                raise Refused(f"file descriptor {fd} is not open") from None
        self.run = run
        self.tmp = os.path.join(run, "tmp")
        self.alone = alone
        self.starter = starter
        self.worker: int | None = None
        self.witness: int | None = None
        self.status: int | None = None
        if not alone:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._occupy()
        self.log = Log(run)
        self.foreign = set(segments())
        self.output, self.output_in = os.pipe()
        os.set_blocking(self.output, False)
        # Refused when the user's share of pipe memory is used up: a small pipe does too.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.output, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self.signals = self._catch_signals()
        self.poller = select.poll()
        # No event is asked for: hang-ups are always reported, and the data is not ours.
        self.poller.register(FROM_VM, 0)
        self.poller.register(self.signals, select.POLLIN)
        self.poller.register(self.output, select.POLLIN)
        if starter is not None:
            self.poller.register(starter, select.POLLIN)

    def _occupy(self) -> None:
        try:
            os.makedirs(self.run, 0o700, exist_ok=True)
            os.chmod(self.run, 0o700)
            # Made under another name and locked first, so that nobody ever finds ours unheld.
            draft = os.path.join(self.run, f"lock.{os.getpid()}")
            self.lock = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                # Not flock, which a child would hold too until it executes its program.
                fcntl.lockf(self.lock, fcntl.LOCK_EX)
                os.write(self.lock, LOCK_MARK + b"%d\n" % os.getpid())
                os.link(draft, os.path.join(self.run, "lock"))
            finally:
                os.unlink(draft)
            os.mkdir(self.tmp, 0o700)
            alive = os.path.join(self.run, "alive")
            os.mkfifo(alive, 0o600)
            # Opened for both, because opening for writing alone would wait for a reader.
            self.alive = os.open(alive, os.O_RDWR)
        except FileExistsError:
            raise Refused(f"{self.run} has been used by another run") from None
        except OSError as error:
            raise Refused(f"cannot use {self.run}: {error.strerror}") from None

    def _catch_signals(self) -> int:
        """Deliver signals as bytes, for poll, whatever mask or disposition was inherited."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        return read

    def execute(self, program: "Program", environment: dict[str, str], owner: int) -> int:
        """Run the program to its end, clear away everything, and return the exit code.

        Args:
            program: what the worker's process becomes
            environment: of the worker, but for what says which run it belongs to
            owner: the process that started the port program: the VM's own starter
        """
        ended = False
        try:
            if self.hung_up():
                return 0
            tags = {
                RUN_VARIABLE: self.run,
                "TMPDIR": self.tmp,
                "VLLM_RPC_BASE_PATH": self.tmp,
                "PYTHONUNBUFFERED": "1",
            }
            # Told by its process, and not by a pipe: who holds one open for longer than the worker
            # hides from the VM that nobody reads.
            witness = self._again("--witness", self.run, str(owner))
            self.witness = self._spawn(executed(witness), environment, (), dies=False)
            self.worker = self._spawn(program, {**environment, **tags}, (FROM_VM, TO_VM))
            os.close(TO_VM)
            protect_from_oom_killer()
            self._sweep_neighbours(environment)
            os.close(self.output_in)
            ended = self._watch()
        finally:
            self._kill()
            while self._read_output():
                pass
            abandoned = not ended or self.hung_up()
            if abandoned:
                remove_run(self.run)
            else:
                remove_tree(self.tmp)
        if abandoned or self.status is None:
            return 0
        with open(os.path.join(self.run, "clean"), "xb"):
            pass
        if self.hung_up():
            # Since it was asked: nobody is left to read the status.
            remove_run(self.run)
        code = os.waitstatus_to_exitcode(self.status)
        return code if code >= 0 else 128 - code

    def hung_up(self) -> bool:
        poller = select.poll()
        poller.register(FROM_VM, 0)
        if self.starter is not None:
            poller.register(self.starter, select.POLLIN)
        return bool(poller.poll(0))

    def _again(self, *arguments: str) -> list[str]:
        """The command that runs this program."""
        return [sys.executable, "-I", "-S", os.path.abspath(__file__), *arguments]

    def _spawn(
        self, program: "Program", env: dict[str, str], keep: tuple[int, ...], *, dies: bool = True
    ) -> int:
        """Start a process; unless told otherwise it dies with the guard."""
        guard = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            if dies:
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != guard:
                    os._exit(1)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two.
                signal.signal(number, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self.output_in, 1)
            os.dup2(self.output_in, 2)
            for fd in {FROM_VM, TO_VM}.difference(keep):
                os.close(fd)
            program(env)
        finally:
            os._exit(127)

    def _sweep_neighbours(self, environment: dict[str, str]) -> None:
        base, own = os.path.split(self.run)
        if any(name != own and os.path.exists(lock_path(base, name)) for name in os.listdir(base)):
            self._spawn(executed(self._again("--sweep", base)), environment, ())

    def _watch(self) -> bool:
        """Return when the worker has ended (True) or the VM has hung up (False)."""
        while True:
            ready = {fd for fd, _event in self.poller.poll()}
            if FROM_VM in ready or self.starter in ready:
                return False
            if self.output in ready and not self._read_output():
                self.poller.unregister(self.output)
            if self.signals in ready:
                numbers = os.read(self.signals, 4096)
                self._reap()
                if numbers.strip(bytes([signal.SIGCHLD])):
                    return False
                if self.status is not None:
                    return True

    def _read_output(self) -> bool:
        """Move a piece of what waits in the pipe to the log; False when nothing does."""
        try:
            data = os.read(self.output, PIPE_SIZE)
        except BlockingIOError:
            return False
        self.log.write(data)
        return bool(data)

    def _reap(self) -> bool:
        """Collect the dead and say whether any child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.worker:
                self.status = status

    def _kill(self) -> None:
        """End every descendant, wait until the last is gone, and remove their shared memory.

        All of them become children of this process in the end, because it is their subreaper: no
        child left means no descendant left.
        """
        # Should this process be killed in the middle, a witness that is stopped would see nothing.
        family = [] if self.alone else freeze(besides=self.witness)
        ours = held(segments().keys() - self.foreign, family)
        patience = 0.05
        while True:
            for pid in self._family():
                send(pid, signal.SIGKILL)
            if not self._reap():
                break
            poller = select.poll()
            poller.register(self.signals, select.POLLIN)
            if poller.poll(patience * 1000):
                os.read(self.signals, 4096)
                continue
            patience = min(patience * 2, 5.0)
            if patience == 5.0:
                left = ", ".join(f"{pid} ({state})" for pid, state in self._family().items())
                self.log.remark(f"waiting for the end of {left}")
        remove_segments(
            {
                inode: entry
                for inode, entry in segments().items()
                if inode in ours or (inode not in self.foreign and named_by_libraries(entry.name))
            }
        )

    def _family(self) -> dict[int, str]:
        """The processes of the run, each with its state letter."""
        return children() if self.alone else descendants()


# What a forked process does, given its environment; it does not return.
Program = Callable[[dict[str, str]], None]


def executed(command: list[str]) -> Program:
    """The program that a command names."""

    def program(environment: dict[str, str]) -> None:
        try:
            os.execvpe(command[0], command, environment)  # noqa: S606
        except OSError as error:
            line = f"guard: cannot execute {command[0]}: {error.strerror}\n"
            os.write(2, line.encode(errors="surrogateescape"))

    return program


def protect_from_oom_killer() -> None:
    """Make this process a worse victim than its worker, where we may."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-500")


def end(run: str) -> None:
    """Have the guard of a run, if there is one, end it, and wait for that."""
    try:
        lock = os.open(os.path.join(run, "lock"), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return  # Ended already.
    try:
        # Whoever holds the lock is still the process that wrote its number there.
        if not is_dead(lock) and (guard := os.pread(lock, 64, len(LOCK_MARK)).strip()).isdigit():
            with contextlib.suppress(ProcessLookupError):
                process = os.pidfd_open(int(guard))
                send(int(guard), signal.SIGTERM)
                send(int(guard), signal.SIGCONT)
                await_end(process, SWEEP_LIMIT_S)
    finally:
        os.close(lock)


def await_end(process: int, seconds: float) -> None:
    """Wait for the end of the process that a pidfd stands for, and close that."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    poller.poll(max(0.0, seconds) * 1000)
    os.close(process)


# Sweeping


def lock_path(base: str, name: str) -> str:
    return os.path.join(base, name, "lock")


def sweep(base: str) -> None:
    """Finish the work of the guards that were killed in the run folders of base."""
    with turn(base):
        for name in os.listdir(base):
            with dead_lock(base, name) as lock:
                if lock is not None:
                    bury(os.path.join(base, name), os.fstat(lock).st_mtime_ns)


@contextlib.contextmanager
def turn(base: str) -> Iterator[None]:
    """Wait for the other sweeps of base, and have them wait.

    So after any of them all is done that there was to do, also when the one before was killed in
    the middle.
    """
    folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def dead_lock(base: str, name: str) -> Iterator[int | None]:
    """The lock of a run folder whose guard is dead; None where it is alive, or this is none."""
    try:
        lock = os.open(lock_path(base, name), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        yield lock if is_dead(lock) else None
    finally:
        os.close(lock)


def is_dead(lock: int) -> bool:
    """Whether this is the lock of a run of our user that no guard holds."""
    status = os.fstat(lock)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return False
    if os.read(lock, len(LOCK_MARK)) != LOCK_MARK:
        return False
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def bury(run: str, started_ns: int) -> None:
    try:
        if time.time() - os.stat(os.path.join(run, "clean")).st_mtime < CLEAN_GRACE_S:
            return
    except FileNotFoundError:
        if not end_tagged(run, started_ns):
            return
    remove_run(run)


def end_tagged(run: str, started_ns: int) -> bool:
    """Kill the processes of a run and remove their shared memory; False if some would not go."""
    deadline = time.monotonic() + SWEEP_LIMIT_S
    if not kill_tagged(run, started_ns, deadline) or not await_released(run, deadline):
        return False
    remove_segments(
        {
            inode: entry
            for inode, entry in segments().items()
            if named_by_libraries(entry.name) and changed_ns(entry) >= started_ns
        }
    )
    return True


def changed_ns(entry: os.DirEntry[str]) -> int:
    return entry.stat(follow_symlinks=False).st_ctime_ns  # Known since owner() asked for it.


def kill_tagged(run: str, started_ns: int, deadline: float) -> bool:
    """Kill the processes whose environment names the run; False if some would not go."""
    tag = os.fsencode(f"{RUN_VARIABLE}={run}")
    patience = min(deadline, time.monotonic() + EXEC_LIMIT_S)
    while time.monotonic() < deadline:
        tagged, may_come = [], False
        for pid in pids():
            environment = read_proc(pid, "environ")
            if tag in environment.split(b"\0"):
                tagged.append(pid)
            elif not environment and is_in_exec(pid, started_ns):
                may_come = True
        for pid in tagged:
            kill_and_wait(pid, deadline)
        if not tagged and (not may_come or time.monotonic() > patience):
            return True
        if not tagged:
            time.sleep(0.01)
    return False


def is_in_exec(pid: int, started_ns: int) -> bool:
    """Whether a process without an environment may be one of a run's that is being executed: it
    lets go of the lifeline, which wakes the witness, before it has its new environment."""
    fields = read_proc(pid, "stat").rpartition(b")")[2].split()
    if not fields or fields[0] in b"ZX" or int(fields[6]) & PF_KTHREAD:
        return False
    with contextlib.suppress(OSError):
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return False
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # The clock of files is coarse.
    return age_s <= (time.time_ns() - started_ns) / 1e9 + 1.0


def kill_and_wait(pid: int, deadline: float) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    send(pid, signal.SIGKILL)
    await_end(process, deadline - time.monotonic())


def await_released(run: str, deadline: float) -> bool:
    """Wait until nobody holds the lifeline of a dead guard; False if some would not let go.

    They got SIGKILL with the guard's end, but one that has much memory takes a while to die, holds
    its shared memory meanwhile, and may have overwritten its environment with its title.
    """
    while time.monotonic() < deadline:
        try:
            lifeline = os.open(os.path.join(run, "alive"), os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):  # No reader; no lifeline.
                return True
            raise
        try:
            # Reports that there is no reader any more. Held for a moment only: closed, it kills
            # those who came meanwhile and took this process for the guard.
            no_reader = select.poll()
            no_reader.register(lifeline, 0)
            no_reader.poll(100)
        finally:
            os.close(lifeline)
    return False


# Witnessing


def witness(run: str, owner: int) -> None:
    """Wait for the death of the run's guard and finish its work."""
    owner_gone = select.poll()
    try:
        owner_gone.register(os.pidfd_open(owner), select.POLLIN)
        patience = CLEAN_GRACE_S
    except ProcessLookupError:
        patience = 0.0
    await_death(run)
    base, name = os.path.split(run)
    with turn(base), dead_lock(base, name) as lock:
        if lock is None or not end_tagged(run, os.fstat(lock).st_mtime_ns):
            return  # Its owner was faster; or it is left to a sweep.
        remove_tree(os.path.join(run, "tmp"))
        with open(os.path.join(run, "clean"), "wb"):
            pass
    # An owner that lives reads the log and removes the folder, as after any end.
    deadline = time.monotonic() + patience
    while os.path.exists(run) and time.monotonic() < deadline and not owner_gone.poll(100):
        pass
    remove_run(run)


def await_death(run: str) -> None:
    lifeline = os.open(os.path.join(run, "alive"), os.O_RDONLY | os.O_NONBLOCK)
    try:
        # An end of file says that it is dead already, which poll would not tell.
        with contextlib.suppress(BlockingIOError):
            os.read(lifeline, 1)
            return
        hang_up = select.poll()
        hang_up.register(lifeline, 0)
        hang_up.poll()
    finally:
        os.close(lifeline)  # Whoever holds it is waited for.


# Nurseries


def through(path: str, run: str) -> int | None:
    """Have a nursery fork the guard of a run, and wait for its end.

    Returns:
        its exit code; None where no nursery has taken the run
    """
    nursery = os.path.dirname(os.path.dirname(path))
    deadline = time.monotonic() + NURSERY_LIMIT_S
    connection = reach(path, nursery, deadline)
    if connection is None:
        return None
    with connection:
        try:
            words = [run, os.getcwd(), str(os.getppid())]
            words += [f"{name}={value}" for name, value in os.environ.items()]
            message = os.fsencode("\0".join(words))
            connection.settimeout(max(1.0, deadline - time.monotonic()))
            socket.send_fds(
                connection, [len(message).to_bytes(LENGTH_BYTES, "big")], [0, 1, 2, FROM_VM, TO_VM]
            )
            connection.sendall(message)
            waiting = select.poll()
            waiting.register(FROM_VM, 0)
            waiting.register(connection, select.POLLIN)
            if not (ready := dict(waiting.poll(max(0.0, deadline - time.monotonic()) * 1000))):
                # Stopped, say: who comes later is to have another one. Once it has ended, nobody
                # answers but what it may have forked for this run.
                end(nursery)
                ready = dict(waiting.poll())
            if FROM_VM in ready:
                return 0  # What the nursery may be forking sees it, too.
            if not connection.recv(1):
                return None
        except OSError:
            return None
        connection.settimeout(None)
        # Nobody is to take this process for one that reads the pipe.
        os.close(TO_VM)
        code = connection.recv(1)
        return code[0] if code else 128 + signal.SIGKILL


def reach(path: str, nursery: str, deadline: float) -> socket.socket | None:
    """A connection to a nursery, which may not listen yet; None where there is none."""
    waiting = select.poll()
    waiting.register(FROM_VM, 0)
    while os.path.exists(os.path.join(nursery, "lock")) and time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError:
            connection.close()
        if os.path.exists(os.path.join(nursery, "clean")) or waiting.poll(20):
            break
    return None


def main(arguments: list[str]) -> int:
    try:
        if sys.platform != "linux":
            raise Refused(f"this program needs Linux; this is {sys.platform}")
        match arguments:
            case ["--end", run]:
                end(os.path.realpath(run))
                return 0
            case ["--sweep", base]:
                with contextlib.suppress(FileNotFoundError):  # No run has ever been there.
                    sweep(os.path.realpath(base))
                return 0
            case ["--witness", run, owner]:
                with contextlib.suppress(FileNotFoundError):  # All is done.
                    witness(run, int(owner))
                return 0
            case ["--nursery", path, run, "--", _program, *_]:
                run = checked(run)
                code = through(path, run)
                return guard(run, arguments[4:]) if code is None else code
            case ["--alone", run, "--", _program, *_]:
                return guard(checked(run), arguments[3:], alone=True)
            case [run, "--", _program, *_]:
                return guard(checked(run), arguments[2:])
            case _:
                raise Refused(
                    "usage: guard.py [--alone | --nursery SOCKET] RUN_DIR -- PROGRAM ARGS... "
                    "| --end RUN_DIR | --sweep BASE_DIR"
                )
    except Refused as error:
        print(f"guard: {error}", file=sys.stderr)
        return 2


def checked(run: str) -> str:
    run = os.path.realpath(run)
    if len(os.fsencode(run)) > RUN_DIR_LIMIT:
        raise Refused(
            f"{run} is too long: sockets need a run folder of at most {RUN_DIR_LIMIT} bytes"
        )
    return run


def guard(run: str, command: list[str], *, alone: bool = False) -> int:
    return Guard(run, alone=alone).execute(executed(command), dict(os.environ), os.getppid())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
