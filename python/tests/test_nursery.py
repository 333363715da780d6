"""Workers that a nursery forks. What ``test_guard.py`` says of guards holds for theirs, too."""

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from test_guard import GUARD, NURSERY, PRELUDE, PYTHON_DIR, Run, until_readable

ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PYTHON_DIR)}

# Says its process, its guard and what began the program.
WHO = "say(os.getpid(), os.getppid(), '__file__' in dir(), os.getsid(0), os.getcwd())\n"


@pytest.fixture
def base() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="guard-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


Begin = Callable[..., Run]


@pytest.fixture
def begin(base: Path) -> Iterator[Begin]:
    """Starts a nursery, or with one a worker."""
    runs: list[Run] = []

    def start(program: str, nursery: Run | None = None, guard: str = GUARD, **env: str) -> Run:
        folder = base / f"run{len(runs)}"
        env |= ENVIRONMENT
        if nursery is None:
            run = Run(folder, [sys.executable, "-c", program], env, ["--alone"])
            run.await_lock()
        else:
            program = PRELUDE + program
            command = [sys.executable, "-c", program]
            mode = ["--nursery", str(nursery.folder / "tmp" / "nursery")]
            run = Run(folder, command, env | {"PROGRAM": program}, mode, guard)
        runs.append(run)
        return run

    yield start
    for run in reversed(runs):
        run.dispose()


def read(pid: int, name: str) -> list[bytes]:
    return Path(f"/proc/{pid}/{name}").read_bytes().rstrip(b"\0").split(b"\0")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_worker_is_a_fork_with_a_guard_and_an_environment_of_its_own(begin: Begin) -> None:
    nursery = begin(NURSERY)
    run = begin(
        WHO + "say(os.environ['WORD'], os.environ['TMPDIR'])\nwait_for_ever()", nursery, WORD="one"
    )
    pid, guard, _started, session, folder = run.line()

    assert int(guard) == run.guard == parent(int(pid))
    assert parent(run.guard) == nursery_worker(nursery)
    assert int(session) == int(pid)
    assert folder == os.getcwd()
    assert run.line() == ["one", str(run.folder / "tmp")]
    # As sweeps and people see it.
    assert read(int(pid), "environ")[0] == f"EX_VLLM_RUN={run.folder}".encode()
    assert read(int(pid), "cmdline") == [b"python", b"-m", b"vllm_bridge"]
    assert not any(b"EX_VLLM_RUN" in variable for variable in read(run.guard, "environ"))


def test_a_worker_has_its_temporary_files_in_its_own_folder(begin: Begin) -> None:
    nursery = begin("import tempfile\ntempfile.gettempdir()\n" + NURSERY)
    run = begin("import tempfile\nsay(tempfile.gettempdir())\nwait_for_ever()", nursery)

    assert run.line() == [str(run.folder / "tmp")]


def nursery_worker(nursery: Run) -> int:
    (child,) = (
        int(name)
        for name in filter(str.isdigit, os.listdir("/proc"))
        if parent_or_none(int(name)) == nursery.pid
        and b"--witness" not in read(int(name), "cmdline")
    )
    return child


def parent_or_none(pid: int) -> int | None:
    try:
        return parent(pid)
    except OSError:
        return None


def test_the_end_of_a_worker_is_told_as_that_of_a_started_one(begin: Begin) -> None:
    nursery = begin(NURSERY)

    assert begin("sys.exit(7)", nursery).end() == 7
    assert begin("os.kill(os.getpid(), signal.SIGSEGV)", nursery).end() == 128 + signal.SIGSEGV
    assert begin("raise OSError('no')", nursery).end() == 1


def test_a_killed_port_program_takes_the_tree_with_it(begin: Begin) -> None:
    run = begin(
        "say(os.getpid())\nforked(lambda: (say(os.getpid()), os.setsid(), wait_for_ever()))\n"
        "wait_for_ever()",
        begin(NURSERY),
    )
    run.pids(2)
    guard = os.pidfd_open(run.guard)

    os.kill(run.pid, signal.SIGKILL)

    run.wait_until_gone()
    until_readable(guard, "the end of the guard")
    os.close(guard)
    assert not run.folder.exists()


def test_a_stopped_port_program_ends_with_its_run(begin: Begin) -> None:
    run = begin("say(os.getpid())\nwait_for_ever()", begin(NURSERY))
    run.pids(1)

    os.kill(run.pid, signal.SIGSTOP)
    run.hang_up()

    assert run.end() == 0
    run.wait_until_gone()
    assert not run.folder.exists()


def test_runs_outlive_their_nursery_and_later_ones_do_without(begin: Begin) -> None:
    nursery = begin(NURSERY)
    run = begin("say(os.getpid())\nsay(os.read(3, 1))\nwait_for_ever()", nursery)
    run.pids(1)

    os.kill(nursery_worker(nursery), signal.SIGKILL)
    assert nursery.end() == 128 + signal.SIGKILL

    os.write(run.requests, b"x")
    assert run.line() == ["b'x'"]
    later = begin(WHO + "wait_for_ever()", nursery)
    assert int(later.line()[1]) == later.pid
    run.hang_up()
    assert run.end() == 0
    run.wait_until_gone()


def test_a_nursery_that_ends_leaves_nothing_of_its_own(begin: Begin) -> None:
    nursery = begin(NURSERY)
    begin("say(1)\nwait_for_ever()", nursery).line()

    nursery.hang_up()

    assert nursery.end() == 0
    assert not nursery.folder.exists()


# Python knows nothing of the second thread.
@pytest.mark.parametrize("thread", ["threading.Thread(target=wait).start()", "start(wait, ())"])
def test_a_nursery_with_threads_forks_nothing(begin: Begin, thread: str) -> None:
    threads = f"""
import threading
from _thread import start_new_thread as start
wait = threading.Event().wait
{thread}
"""
    run = begin(WHO + "wait_for_ever()", begin(threads + NURSERY))

    assert int(run.line()[1]) == run.pid


def test_a_nursery_that_does_not_answer_is_ended_and_done_without(
    begin: Begin, tmp_path: Path
) -> None:
    impatient = tmp_path / "impatient.py"
    impatient.write_text(
        f"""
import sys
sys.path.insert(0, {str(PYTHON_DIR)!r})
from vllm_bridge import guard
guard.NURSERY_LIMIT_S = 0.5
sys.exit(guard.main(sys.argv[1:]))
"""
    )
    nursery = begin(NURSERY)
    begin("say(1)\nwait_for_ever()", nursery).line()
    os.kill(nursery_worker(nursery), signal.SIGSTOP)

    run = begin(WHO + "wait_for_ever()", nursery, str(impatient))

    assert int(run.line()[1]) == run.pid
    assert nursery.end() == 0


def test_a_run_that_is_handed_over_in_part_does_not_keep_others_waiting(begin: Begin) -> None:
    nursery = begin(NURSERY.replace("MODULES = ()", "HAND_OVER_LIMIT_S, nursery.MODULES = 0.1, ()"))
    first = begin(WHO + "wait_for_ever()", nursery)
    assert int(first.line()[1]) != first.pid
    with socket.socket(socket.AF_UNIX) as stopped, socket.socket(socket.AF_UNIX) as silent:
        for connection in (stopped, silent):
            connection.connect(str(nursery.folder / "tmp" / "nursery"))
        socket.send_fds(stopped, [(100).to_bytes(4, "big")], [0, 1, 2, 0, 1])
        stopped.sendall(b"the beginning")

        run = begin(WHO + "wait_for_ever()", nursery)

        assert int(run.line()[1]) == run.guard != run.pid


def test_a_run_whose_folder_is_gone_does_without_a_nursery(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nursery = begin(NURSERY)
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()

    run = begin("say(os.getppid())\nwait_for_ever()", nursery)

    assert int(run.line()[0]) == run.pid


def test_a_worker_that_is_refused_says_why(begin: Begin, base: Path) -> None:
    nursery = begin(NURSERY)
    (base / "run1").mkdir()
    (base / "run1" / "tmp").mkdir()
    run = begin("say(1)", nursery)

    assert run.end() == 2
    assert b"has been used by another run" in os.read(run.errors, 4096)


def test_a_worker_has_the_signals_and_descriptors_of_a_started_one(begin: Begin) -> None:
    program = """
handlers = [signal.getsignal(number) for number in (
    signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE)]
say(*(getattr(handler, "name", handler.__class__.__name__) for handler in handlers))
say(*sorted({os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
             for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}))
wait_for_ever()
"""
    run = begin(program, begin(NURSERY))

    assert run.line() == ["SIG_DFL", "SIG_DFL", "builtin_function_or_method", "SIG_IGN"]
    assert set(run.line()) <= {"/dev/null", "pipe", str(run.folder / "alive"), "/proc"}
