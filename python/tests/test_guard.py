"""The guard as the Erlang VM sees it: a program on two pipes, whose end means that all is gone."""

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import pytest

from vllm_bridge import guard

PYTHON_DIR = Path(__file__).resolve().parents[1]
GUARD = str(PYTHON_DIR / "vllm_bridge" / "guard.py")
LOG_LIMIT = 4 * 1024 * 1024
DEADLINE_S = 30.0

# What the stand-in workers have in common. say() sends a line to the test, on descriptor 4 as a
# worker would; a process that says its pid is one the test wants to see gone.
PRELUDE = """
import os, signal, subprocess, sys, threading
def say(*words):
    os.write(4, (" ".join(map(str, words)) + "\\n").encode())
def wait_for_ever():
    while True:
        signal.pause()
def forked(body):
    pid = os.fork()
    if pid == 0:
        body()
        os._exit(0)
    return pid
"""


def until_readable(fd: int, what: str) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(DEADLINE_S * 1000), f"waited in vain for {what}"


def has_ended(process: int) -> bool:
    """Whether the process behind a pidfd has ended."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(0))


class Run:
    """A guard started as a port program, and the VM's ends of its two pipes."""

    def __init__(
        self,
        folder: Path,
        command: list[str],
        env: dict[str, str],
        mode: Sequence[str] = (),
        guard: str = GUARD,
    ) -> None:
        self.folder = folder
        self.received = b""
        self.family: dict[int, int] = {}
        request_read, self.requests = high_pipe()
        self.replies, reply_write = high_pipe()
        error_read, error_write = high_pipe()
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", guard, *mode, str(folder), "--", *command],
            env,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, request_read, 3),
                (os.POSIX_SPAWN_DUP2, reply_write, 4),
                (os.POSIX_SPAWN_DUP2, error_write, 2),
            ],
        )
        for fd in (request_read, reply_write, error_write):
            os.close(fd)
        self.errors = error_read
        self.process = os.pidfd_open(self.pid)
        self.status: int | None = None

    def hang_up(self) -> None:
        """Close the VM's ends, as its death would."""
        for fd in (self.requests, self.replies):
            with contextlib.suppress(OSError):
                os.close(fd)

    def line(self) -> list[str]:
        """The words of the next line that the worker says."""
        while b"\n" not in self.received:
            until_readable(self.replies, "a line of the worker")
            data = os.read(self.replies, 4096)
            assert data, f"the worker ended: {self.log()}"
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        return line.decode().split()

    def pids(self, count: int) -> list[int]:
        """The pids that the next lines say, from now on watched."""
        found = [int(self.line()[0]) for _ in range(count)]
        for pid in found:
            self.family[pid] = os.pidfd_open(pid)
        return found

    def all_gone(self) -> bool:
        return all(has_ended(process) for process in self.family.values())

    def wait_until_gone(self) -> None:
        for pid, process in self.family.items():
            until_readable(process, f"the end of {pid}")

    def end(self) -> int:
        """Wait for the guard's end: its exit code, or minus the signal that killed it."""
        if self.status is None:
            until_readable(self.process, "the end of the guard")
            self.status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(self.status)

    def await_lock(self) -> None:
        """Waits until the guard has begun."""
        deadline = time.monotonic() + DEADLINE_S
        while not (self.folder / "lock").exists():
            assert time.monotonic() < deadline, "the guard did not begin"
            time.sleep(0.01)

    @property
    def guard(self) -> int:
        """The guard's pid; a nursery's is not the program that was started."""
        return int((self.folder / "lock").read_text().split()[1])

    def witness(self) -> int:
        """The pid of the guard's witness."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            for name in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                    if b"--witness" in command and os.fsencode(self.folder) in command:
                        return int(name)
        raise AssertionError("there is no witness")

    def kill_guard_and_witness(self) -> None:
        """As a power cut does, nearly: nobody is left who could clean up."""
        os.kill(self.witness(), signal.SIGKILL)
        os.kill(self.guard, signal.SIGKILL)
        self.end()

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def names(self) -> set[str]:
        return set(os.listdir(self.folder))

    def dispose(self) -> None:
        self.hang_up()
        if self.status is None:
            self.end()
        for fd in (self.process, self.errors, *self.family.values()):
            os.close(fd)


def high_pipe() -> tuple[int, int]:
    """A pipe clear of the descriptors 3 and 4, so that these can be made of it."""
    pipe = os.pipe()
    read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pipe)
    for fd in pipe:
        os.close(fd)
    return read, write


@pytest.fixture
def base() -> Iterator[Path]:
    # Not tmp_path: run folders must have short paths.
    folder = Path(tempfile.mkdtemp(prefix="guard-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


Start = Callable[..., Run]

# The exit codes of a guard that was killed, and of a port program whose guard was.
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


# A nursery whose workers run the Python program in their environment.
NURSERY = """
import os
from vllm_bridge import nursery
nursery.MODULES = ()
nursery.main(lambda: exec(os.environ["PROGRAM"], {"__name__": "__main__"}))
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Run]:
    folder = Path(tempfile.mkdtemp(prefix="guard-"))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PYTHON_DIR)}
    run = Run(folder / "nursery", [sys.executable, "-c", NURSERY], env, ["--alone"])
    run.await_lock()
    yield run
    run.dispose()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["started", "forked"])
def start(request: pytest.FixtureRequest, base: Path, nursery: Run) -> Iterator[Start]:
    """Starts a worker under a guard, both by themselves or both forked by a nursery."""
    runs: list[Run] = []
    socket = nursery.folder / "tmp" / "nursery"
    mode = ["--nursery", str(socket)] if request.param == "forked" else []

    def begin(worker: str, *, name: str = "run", env: dict[str, str] | None = None) -> Run:
        program = PRELUDE + worker
        tree_env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PYTHON_DIR), **(env or {})}
        command = [sys.executable, "-c", program]
        runs.append(Run(base / name, command, tree_env | {"PROGRAM": program}, mode))
        return runs[-1]

    yield begin
    for run in runs:
        run.dispose()


@pytest.fixture
def segment_name() -> Iterator[Callable[[str], str]]:
    """Names in /dev/shm for a test, by prefix; removed afterwards."""
    names: list[str] = []

    def name(prefix: str) -> str:
        names.append(f"{prefix}{os.getpid()}{len(names)}")
        return names[-1]

    yield name
    for each in names:
        shm_path(each).unlink(missing_ok=True)


def shm_path(name: str) -> Path:
    return Path("/dev/shm") / name


def run_sweep(base: Path) -> None:
    command = [sys.executable, "-I", "-S", GUARD, "--sweep", str(base)]
    subprocess.run(command, check=True, timeout=DEADLINE_S)


# The worker's own end


def test_the_workers_exit_code_is_the_guards(start: Start) -> None:
    run = start("print('out'); print('err', file=sys.stderr); sys.exit(3)")

    assert run.end() == 3
    assert run.names() == {"alive", "clean", "lock", "log"}
    assert sorted(run.log().split()) == ["err", "out"]
    assert run.folder.stat().st_mode & 0o777 == 0o700


def test_a_worker_killed_by_a_signal_gives_128_and_its_number(start: Start) -> None:
    run = start("os.kill(os.getpid(), signal.SIGABRT)")

    assert run.end() == 128 + signal.SIGABRT


def test_a_program_that_cannot_be_executed_gives_127_and_a_line(base: Path) -> None:
    run = Run(base / "run", [str(base / "missing")], {})

    assert run.end() == 127
    assert run.log() == f"guard: cannot execute {base}/missing: No such file or directory\n"
    assert "clean" in run.names()
    run.dispose()


def test_what_a_worker_finds(start: Start) -> None:
    run = start(
        """
say(*(os.environ[name] for name in ("EX_VLLM_RUN", "TMPDIR", "VLLM_RPC_BASE_PATH")))
say(os.path.isdir(os.environ["TMPDIR"]), sys.stdin.read() == "", os.getsid(0) == os.getpid())
say(signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, signal.pthread_sigmask(0, ()))
"""
    )

    folder = str(run.folder)
    assert run.line() == [folder, folder + "/tmp", folder + "/tmp"]
    assert run.line() == ["True", "True", "True"]
    assert run.line() == ["True", "set()"]
    assert run.end() == 0


def test_the_guard_takes_nothing_from_the_stream(start: Start) -> None:
    run = start("while data := os.read(3, 65536): os.write(4, data)")
    message = bytes(range(256)) * 4096

    os.set_blocking(run.requests, False)
    sent, received = 0, b""
    while len(received) < len(message):
        with contextlib.suppress(BlockingIOError):
            sent += os.write(run.requests, message[sent : sent + 65536])
        until_readable(run.replies, "the echo")
        received += os.read(run.replies, 1024 * 1024)

    assert received == message


def test_the_guard_does_not_hold_the_replies_open(start: Start) -> None:
    run = start("say('once'); os.close(4); wait_for_ever()")
    assert run.line() == ["once"]

    until_readable(run.replies, "the end of the replies")

    assert os.read(run.replies, 1) == b""
    assert not has_ended(run.process)


def test_blocked_signals_are_no_obstacle(start: Start) -> None:
    blocked = {signal.SIGCHLD, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        run = start("sys.exit(6)")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    assert run.end() == 6


def test_everything_below_a_killed_worker_is_gone_when_the_guard_ends(start: Start) -> None:
    run = start(
        """
def in_a_session_of_its_own():
    os.setsid()
    say(os.getpid())
    wait_for_ever()
def deaf_to_requests_to_end():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    say(os.getpid())
    wait_for_ever()
def daemon():
    os.setsid()
    forked(lambda: (say(os.getpid()), wait_for_ever()))
def stopped():
    say(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
say(os.getpid())
for body in (in_a_session_of_its_own, deaf_to_requests_to_end, daemon, stopped):
    forked(body)
subprocess.Popen(["sh", "-c", "echo $$ >&4; read forever <&3"], pass_fds=(3, 4))
wait_for_ever()
"""
    )
    worker = run.pids(6)[0]

    os.kill(worker, signal.SIGKILL)

    assert run.end() == 128 + signal.SIGKILL
    assert run.all_gone()
    assert "clean" in run.names()


def test_a_child_that_keeps_forking_is_caught(start: Start) -> None:
    run = start(
        """
def respawn():
    for _ in range(2000):
        if os.fork():
            os._exit(0)
    wait_for_ever()
say(os.getpid())
forked(respawn)
forked(respawn)
wait_for_ever()
"""
    )
    run.pids(1)
    run.hang_up()

    assert run.end() == 0
    assert run.all_gone()
    assert tagged_processes(run.folder) == []


def tagged_processes(folder: Path) -> list[int]:
    tag = f"EX_VLLM_RUN={folder}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if tag in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


# The VM's end


def test_a_hang_up_removes_the_whole_run(start: Start) -> None:
    run = start("say(os.getpid())\nprint('a line')\nwait_for_ever()")
    run.pids(1)

    run.hang_up()

    assert run.end() == 0
    assert run.all_gone()
    assert not run.folder.exists()


def test_a_hang_up_is_seen_behind_unread_data(start: Start) -> None:
    run = start("say(os.getpid())\nwait_for_ever()")
    run.pids(1)
    os.write(run.requests, b"never read")

    run.hang_up()

    assert run.end() == 0
    assert run.all_gone()


def test_a_stopped_worker_does_not_outlive_the_vm(start: Start) -> None:
    run = start(
        """
forked(lambda: (say(os.getpid()), os.kill(os.getpid(), signal.SIGSTOP)))
say(os.getpid())
os.kill(os.getpid(), signal.SIGSTOP)
"""
    )
    run.pids(2)

    run.hang_up()

    assert run.end() == 0
    assert run.all_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_guard_counts_as_a_hang_up(start: Start, number: signal.Signals) -> None:
    run = start("say(os.getpid())\nwait_for_ever()")
    run.pids(1)

    os.kill(run.guard, number)

    assert run.end() == 0
    assert run.all_gone()
    assert not run.folder.exists()


def test_a_run_is_ended_on_request_though_the_guard_was_stopped(start: Start) -> None:
    run = start("say(os.getpid()); os.kill(os.getpid(), signal.SIGSTOP)")
    run.pids(1)
    os.kill(run.guard, signal.SIGSTOP)
    arguments = [sys.executable, "-I", "-S", GUARD, "--end", str(run.folder)]
    assert subprocess.run(arguments, check=False).returncode == 0
    assert run.end() == 0
    assert run.all_gone()
    assert not run.folder.exists()
    assert subprocess.run(arguments, check=False).returncode == 0


def test_nothing_starts_after_a_hang_up(base: Path) -> None:
    witness = base / "witness"
    requests, requests_write = high_pipe()
    os.close(requests_write)
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", GUARD, str(base / "run"), "--", "touch", str(witness)],
        {"PATH": os.environ["PATH"]},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, requests, 3),
            (os.POSIX_SPAWN_OPEN, 4, os.devnull, os.O_WRONLY, 0),
        ],
    )
    os.close(requests)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert list(base.iterdir()) == []


# The log


def test_a_flood_is_logged_within_bounds(start: Start) -> None:
    run = start(
        """
line = b"x" * 1023 + b"\\n"
for _ in range(50):
    os.write(1, line * 1024)
print("the last line")
"""
    )

    assert run.end() == 0
    assert (run.folder / "log").stat().st_size <= LOG_LIMIT
    assert LOG_LIMIT // 2 < (run.folder / "log.1").stat().st_size <= LOG_LIMIT
    assert run.log().endswith("x\nthe last line\n")
    assert run.names() == {"alive", "clean", "lock", "log", "log.1"}


def test_a_hang_up_is_seen_in_a_flood(start: Start) -> None:
    run = start("say(os.getpid())\nwhile True: os.write(2, b'x' * 65536)")
    run.pids(1)

    run.hang_up()

    assert run.end() == 0
    assert run.all_gone()


def test_the_last_words_of_a_tree_reach_the_log(start: Start) -> None:
    run = start("os.write(1, b'w' * 65000 + b'last'); os.kill(os.getpid(), signal.SIGKILL)")

    assert run.end() == 128 + signal.SIGKILL
    assert run.log() == "w" * 65000 + "last"


def test_a_worker_may_close_its_output(start: Start) -> None:
    run = start("os.close(1); os.close(2); say('closed'); os.read(3, 1); os._exit(5)")
    assert run.line() == ["closed"]

    os.write(run.requests, b".")

    assert run.end() == 5


# The guard's end


def test_a_killed_guard_takes_the_tree_with_it(start: Start) -> None:
    run = start(
        """
def in_a_session_of_its_own():
    os.setsid()
    say(os.getpid())
    wait_for_ever()
def stopped_grandchild():
    forked(lambda: (say(os.getpid()), os.kill(os.getpid(), signal.SIGSTOP)))
    wait_for_ever()
forked(in_a_session_of_its_own)
forked(stopped_grandchild)
child = "import os, signal; os.write(4, b'%d\\\\n' % os.getpid()); signal.pause()"
subprocess.Popen([sys.executable, "-c", child], pass_fds=(4,), start_new_session=True)
say(os.getpid())
wait_for_ever()
"""
    )
    run.pids(4)

    os.kill(run.guard, signal.SIGKILL)

    assert run.end() in KILLED
    run.wait_until_gone()


# The witness


def not_python(segment: str) -> str:
    """A worker with a child that only its environment tells, and a segment."""
    return (
        MAKE_SEGMENTS
        + f"""
held = make({segment!r})
subprocess.Popen(["sh", "-c", "echo $$ >&4; read forever <&3"], pass_fds=(3, 4))
wait_for_ever()
"""
    )


def slow_to_die(segment: str) -> str:
    """A worker with a child that its environment does not tell, and that holds the segment and the
    lifeline for a while yet, as a process does that has much memory to give back."""
    script = 'exec 5<"$1" 6<>"$2"; echo $$ >&4; read end <&5; sleep 1'
    return (
        MAKE_SEGMENTS
        + f"""
held = make({segment!r})
files = [os.environ["EX_VLLM_RUN"] + "/alive", "/dev/shm/" + {segment!r}]
command = ["sh", "-c", {script!r}, "sh", *files]
subprocess.Popen(command, pass_fds=(4,), env={{"PATH": os.environ["PATH"]}})
wait_for_ever()
"""
    )


@pytest.mark.parametrize("worker", [not_python, slow_to_die])
def test_a_witness_finishes_the_work_of_a_killed_guard(
    start: Start, segment_name: Callable[[str], str], worker: Callable[[str], str]
) -> None:
    name = segment_name("psm_")
    run = start(worker(name))
    run.pids(1)
    witness = os.pidfd_open(run.witness())
    assert shm_path(name).exists()

    os.kill(run.guard, signal.SIGKILL)

    assert run.end() in KILLED
    run.wait_until_gone()
    # The owner lives and is to read the log.
    while not (run.folder / "clean").exists():
        assert not has_ended(witness)
        time.sleep(0.01)
    assert not shm_path(name).exists()
    assert run.names() == {"alive", "clean", "lock", "log"}

    shutil.rmtree(run.folder)

    until_readable(witness, "the end of the witness")
    os.close(witness)


def test_a_witness_whose_owner_died_too_removes_everything(
    start: Start, segment_name: Callable[[str], str]
) -> None:
    name = segment_name("psm_")
    run = start(not_python(name))
    run.pids(1)
    run.kill_guard_and_witness()
    owner = subprocess.Popen([sys.executable, "-c", ""])
    owner.wait()

    command = [sys.executable, "-I", "-S", GUARD, "--witness", str(run.folder), str(owner.pid)]
    subprocess.run(command, check=True, timeout=DEADLINE_S)

    run.wait_until_gone()
    assert not shm_path(name).exists()
    assert not run.folder.exists()


def test_a_witness_is_not_stopped_with_the_tree() -> None:
    # Its guard may be killed right after that, and then it is the one who ends the others.
    program = f"""
import os, runpy, signal
guard = runpy.run_path({GUARD!r}, run_name="guard")
pids = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    pids.append(pid)
stopped, witness = pids
print(guard["freeze"](besides=witness) == [stopped])
print(guard["descendants"]()[stopped], guard["descendants"]()[witness])
for pid in pids:
    os.kill(pid, signal.SIGKILL)
"""
    command = [sys.executable, "-I", "-S", "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    frozen, first, second = said.stdout.split()
    assert (frozen, first) == ("True", "T")
    assert second in "RS"


def test_a_witness_ends_with_its_guard(start: Start) -> None:
    run = start("say('up'); wait_for_ever()")
    assert run.line() == ["up"]
    witness = os.pidfd_open(run.witness())

    run.hang_up()

    assert run.end() == 0
    assert has_ended(witness)
    os.close(witness)


def test_a_run_goes_on_without_its_witness(start: Start) -> None:
    run = start("os.write(4, os.read(3, 9))")
    os.kill(run.witness(), signal.SIGKILL)

    os.write(run.requests, b"answer\n")

    assert run.line() == ["answer"]
    assert run.end() == 0


def test_a_killed_guard_takes_a_worker_that_is_not_python_with_it(base: Path) -> None:
    run = Run(base / "run", ["/bin/sh", "-c", "echo $$ >&4; read forever <&3"], {})
    run.pids(1)

    os.kill(run.guard, signal.SIGKILL)

    run.wait_until_gone()
    run.dispose()


def test_a_process_started_from_a_thread_outlives_the_thread(start: Start) -> None:
    run = start(
        """
child = "import os, sys; os.write(4, b'%d\\\\n' % os.getpid()); os.write(4, os.read(3, 9))"
def launch():
    subprocess.Popen([sys.executable, "-c", child], pass_fds=(3, 4))
thread = threading.Thread(target=launch)
thread.start()
thread.join()
say("joined")
wait_for_ever()
"""
    )
    lines = {run.line()[0], run.line()[0]}
    assert "joined" in lines

    os.write(run.requests, b"answer\n")

    assert run.line() == ["answer"]


def test_a_process_of_a_run_that_is_over_ends_itself(base: Path) -> None:
    env = {"PYTHONPATH": str(PYTHON_DIR), "EX_VLLM_RUN": str(base / "gone")}
    command = [sys.executable, "-c", "print('alive')"]

    missing = subprocess.run(command, env=env, capture_output=True, text=True)
    (base / "gone").mkdir()
    os.mkfifo(base / "gone" / "alive")
    unguarded = subprocess.run(command, env=env, capture_output=True, text=True)

    for ended, reason in ((missing, "No such file or directory"), (unguarded, "it has ended")):
        assert (ended.returncode, ended.stdout) == (1, "")
        assert f"no guard for {base}/gone" in ended.stderr
        assert reason in ended.stderr


def test_another_sitecustomize_runs_too(base: Path) -> None:
    (base / "sitecustomize.py").write_text("import sys; sys.the_other_one = __name__, __file__\n")
    path = f"{PYTHON_DIR}:{base}"

    done = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.the_other_one)"],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["sitecustomize", str(base / "sitecustomize.py")]
    assert done.stderr == ""


# Shared memory

MAKE_SEGMENTS = """
from multiprocessing import resource_tracker, shared_memory
def make(name):
    segment = shared_memory.SharedMemory(name, create=True, size=4096)
    resource_tracker.unregister(segment._name, "shared_memory")
    return segment
"""


@pytest.mark.parametrize(
    "prefix", ["psm_", "sem.mp-", "torch_", "vllm_mm_", "29500-tp:0-[0]-cpushm"]
)
def test_segments_of_a_dead_worker_are_removed(
    start: Start, segment_name: Callable[[str], str], prefix: str
) -> None:
    name = segment_name(prefix)
    run = start(MAKE_SEGMENTS + f"held = make({name!r}); say(os.getpid()); wait_for_ever()")
    (worker,) = run.pids(1)
    assert shm_path(name).exists()

    # Nobody is left then who could be seen to hold the segment: only its name tells.
    os.kill(worker, signal.SIGKILL)

    assert run.end() == 128 + signal.SIGKILL
    assert not shm_path(name).exists()


def test_segments_that_the_tree_holds_need_no_known_name(
    start: Start, segment_name: Callable[[str], str]
) -> None:
    mapped, opened = segment_name("guardtest-"), segment_name("guardtest-")
    run = start(
        MAKE_SEGMENTS
        + f"""
def child():
    segment = make({mapped!r})
    fd = os.open("/dev/shm/{opened}", os.O_RDWR | os.O_CREAT, 0o600)
    say(os.getpid())
    wait_for_ever()
forked(child)
say(os.getpid())
wait_for_ever()
"""
    )
    run.pids(2)

    run.hang_up()

    assert run.end() == 0
    assert not shm_path(mapped).exists()
    assert not shm_path(opened).exists()


def test_segments_of_others_stay(start: Start, segment_name: Callable[[str], str]) -> None:
    # Older than the run, though held by it; of another kind; in use elsewhere.
    older, stranger = segment_name("guardtest-"), segment_name("guardtest-")
    used = segment_name("psm_")
    shm_path(older).write_bytes(b"data")
    run = start(f"held = open('/dev/shm/{older}', 'rb')\nsay('open')\nwait_for_ever()")
    assert run.line() == ["open"]
    shm_path(stranger).write_bytes(b"data")
    segment = shared_memory.SharedMemory(used, create=True, size=4096)

    run.hang_up()

    assert run.end() == 0
    assert [shm_path(name).exists() for name in (older, stranger, used)] == [True] * 3
    segment.close()
    resource_tracker.unregister("/" + used, "shared_memory")


# Sweeping


def test_a_sweep_finishes_the_work_of_a_killed_guard(
    start: Start, base: Path, segment_name: Callable[[str], str]
) -> None:
    name = segment_name("psm_")
    run = start(not_python(name))
    run.pids(1)
    run.kill_guard_and_witness()
    assert not run.all_gone()

    run_sweep(base)

    assert run.all_gone()
    assert not shm_path(name).exists()
    assert not run.folder.exists()


def test_a_sweep_leaves_the_living_and_the_unknown_alone(
    start: Start, base: Path, segment_name: Callable[[str], str]
) -> None:
    name = segment_name("psm_")
    run = start(MAKE_SEGMENTS + f"held = make({name!r}); say(os.getpid()); wait_for_ever()")
    run.pids(1)
    (base / "folder").mkdir()
    (base / "program").mkdir()
    (base / "program" / "lock").write_text("12345\n")

    run_sweep(base)

    assert not run.all_gone()
    assert shm_path(name).exists()
    assert {path.name for path in base.iterdir()} == {"run", "folder", "program"}


def test_a_sweep_leaves_a_clean_run_to_its_owner_for_a_while(start: Start, base: Path) -> None:
    run = start("print('why it ended')")
    assert run.end() == 0

    run_sweep(base)
    assert run.log() == "why it ended\n"

    long_ago = time.time() - 3600
    os.utime(run.folder / "clean", (long_ago, long_ago))
    run_sweep(base)
    assert not run.folder.exists()


def test_a_guard_sweeps_the_runs_beside_its_own(start: Start, base: Path) -> None:
    dead = start(
        """
subprocess.Popen(["sh", "-c", "echo $$ >&4; read forever <&3"], pass_fds=(3, 4))
wait_for_ever()
""",
        name="dead",
    )
    dead.pids(1)
    dead.kill_guard_and_witness()

    live = start("say(os.getpid())\nwait_for_ever()", name="live")
    live.pids(1)

    dead.wait_until_gone()
    assert not live.all_gone()


def test_sweeps_may_run_at_once(start: Start, base: Path) -> None:
    for number in range(8):
        run = start("say('up'); wait_for_ever()", name=f"run{number}")
        assert run.line() == ["up"]
        run.kill_guard_and_witness()

    command = [sys.executable, "-I", "-S", GUARD, "--sweep", str(base)]
    sweeps = [subprocess.Popen(command) for _ in range(4)]

    assert [process.wait(DEADLINE_S) for process in sweeps] == [0] * 4
    assert list(base.iterdir()) == []


def test_a_sweep_of_a_folder_that_is_not_there_is_nothing(base: Path) -> None:
    run_sweep(base / "missing")


# What cannot be run


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "--"], ["--sweep"], ["a", "b", "c"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", GUARD, *arguments], capture_output=True, text=True
    )

    assert done.returncode == 2
    assert done.stderr.startswith("guard: usage: guard.py [--alone | --nursery SOCKET] RUN_DIR")


def test_a_run_without_its_descriptors_is_refused(base: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", GUARD, str(base / "run"), "--", "true"],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert done.stderr == "guard: file descriptor 3 is not open\n"
    assert list(base.iterdir()) == []


def test_a_run_folder_serves_one_run_only(start: Start) -> None:
    first = start("sys.exit(0)")
    assert first.end() == 0

    second = start("sys.exit(0)")

    assert second.end() == 2
    assert os.read(second.errors, 4096).decode().endswith("has been used by another run\n")
    assert first.names() == {"alive", "clean", "lock", "log"}


def test_a_run_folder_too_deep_for_sockets_is_refused(start: Start) -> None:
    run = start("sys.exit(0)", name="deep" * 20)

    assert run.end() == 2
    assert b"sockets need a run folder of at most 66 bytes" in os.read(run.errors, 4096)
    assert not run.folder.exists()


def test_a_process_that_is_being_executed_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, started = str(tmp_path / "run"), time.time_ns()
    read, unborn = guard.read_proc, 3
    with (
        subprocess.Popen(["/bin/sleep", "60"], env={guard.RUN_VARIABLE: run}) as ours,
        # It has no environment, and will have none.
        subprocess.Popen(["/bin/sleep", "60"], env={}) as other,
    ):

        def read_proc(pid: int, name: str) -> bytes:
            nonlocal unborn
            if (pid, name) == (ours.pid, "environ") and unborn > 0:
                unborn -= 1
                return b""
            return read(pid, name)

        try:
            monkeypatch.setattr(guard, "read_proc", read_proc)
            assert guard.kill_tagged(run, started, time.monotonic() + 10)
            assert ours.poll() == -signal.SIGKILL
            assert other.poll() is None
        finally:
            ours.kill()
            other.kill()
