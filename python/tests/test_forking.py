"""Processes that a seed forks, in a program of their own: a seed is for the life of a process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from vllm_bridge import forking

PYTHON = ROOT / "python"

# What the programs begin with; vLLM is not needed, and not imported.
PRELUDE = """
import multiprocessing, os, signal, sys, threading, time
from vllm_bridge import forking
forking._install = lambda: None

def command(pid):
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read().rstrip("\\0").split("\\0")

def parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])

def start(target, *args):
    process = forking._Context().Process(target=target, args=args, name="EngineCore")
    process.start()
    return process
"""


def run(tmp_path: Path, program: str, **env: str) -> list[str]:
    """The lines that a program writes."""
    file = tmp_path / "program.py"
    file.write_text(PRELUDE + program)
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, "PYTHONPATH": str(PYTHON), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_forked_process_is_as_a_spawned_one_but_for_its_imports(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
imported = []

def work(queue):
    queue.put((os.getpid(), os.environ["WORD"], imported, multiprocessing.parent_process().pid,
               multiprocessing.current_process().name, command(os.getpid())))
    print("to where the parent writes", flush=True)
    sys.exit(7)

if __name__ == "__main__":
    imported.append("before the fork")
    print(forking.start())
    imported.append("after it")
    os.environ["WORD"] = "set later"
    queue = forking._Context().Queue()
    process = start(work, queue)
    pid, word, seen, owner, name, arguments = queue.get()
    process.join()
    print(pid == process.pid, word, owner == os.getpid(), name, arguments, process.exitcode)
    print(parent(process.pid) if process.is_alive() else "gone")
""",
    )

    assert lines == [
        "True",
        "to where the parent writes",
        "True set later True EngineCore ['vllm_bridge', 'EngineCore'] 7",
        "gone",
    ]


def test_how_a_forked_process_was_killed_is_known(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
if __name__ == "__main__":
    forking.start()
    processes = [start(time.sleep, 600) for _ in range(2)]
    print(len({parent(process.pid) for process in processes}), command(parent(processes[0].pid)))
    processes[0].kill()
    processes[1].terminate()
    for process in processes:
        process.join()
        print(process.exitcode)
""",
    )

    assert lines == ["1 ['vllm_bridge', 'seed']", "-9", "-15"]


def test_the_seed_ends_with_its_owner(tmp_path: Path) -> None:
    (line,) = run(
        tmp_path,
        """
if __name__ == "__main__":
    forking.start()
    process = start(time.sleep, 600)
    seed = parent(process.pid)
    owner = os.fork()
    process.kill()
    process.join()
    print(seed, flush=True)
    os._exit(0)
""",
    )

    seed = int(line)
    try:
        pidfd = os.pidfd_open(seed)
    except ProcessLookupError:
        return
    import select

    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(30_000)


@pytest.mark.parametrize(
    ("name", "is_forked"),
    [
        ("WORD", True),
        ("VLLM_USE_V1", True),
        ("OMP_NUM_THREADS", True),
        ("HF_HUB_OFFLINE", True),
        ("TORCHINDUCTOR_CACHE_DIR", True),
        ("LD_PRELOAD", False),
        ("GOMP_CPU_AFFINITY", False),
        ("TORCHINDUCTOR_COMPILE_THREADS", False),
    ],
)
def test_a_process_is_spawned_where_a_library_has_read_what_changed(
    tmp_path: Path, name: str, is_forked: bool
) -> None:
    (line,) = run(
        tmp_path,
        f"""
if __name__ == "__main__":
    forking.start()
    os.environ[{name!r}] = "7"
    process = start(time.sleep, 600)
    print(parent(process.pid) != os.getpid())
    process.kill()
""",
    )

    assert line == str(is_forked)


def test_a_process_with_threads_has_no_seed(tmp_path: Path) -> None:
    (line,) = run(
        tmp_path,
        """
if __name__ == "__main__":
    event = threading.Event()
    threading.Thread(target=event.wait).start()
    print(forking.start())
    event.set()
""",
    )

    assert line == "False"


def test_threads_that_are_not_pythons_are_seen(tmp_path: Path) -> None:
    # OpenBLAS ends its threads before a fork; those of OpenMP stay.
    lines = run(
        tmp_path,
        """
if __name__ == "__main__":
    import numpy, torch
    numpy.ones((500, 500)) @ numpy.ones((500, 500))
    print(forking.start())
    forking._seed = None
    torch.set_num_threads(2)
    torch.ones(2000, 2000) @ torch.ones(2000, 2000)
    print(forking.start())
""",
    )

    assert lines == ["True", "False"]


@pytest.mark.engine
def test_vllm_changes_nothing_that_libraries_have_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``preload.environment`` says is what vLLM's config would set."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    before: dict[str, Any] = dict(os.environ)
    arguments: dict[str, Any] = {"model": str(ROOT / "priv/models/demo"), "enforce_eager": True}
    AsyncEngineArgs(**arguments).create_engine_config()

    changed = {
        name
        for name in before.keys() | os.environ.keys()
        if before.get(name) != os.environ.get(name)
    }
    assert changed & {"VLLM_WORKER_MULTIPROC_METHOD", "LOCAL_WORLD_SIZE"}
    assert not {
        name
        for name in changed - forking.APPLIED.keys() - forking.READ_LATER
        if name.startswith(forking.READ_ON_IMPORT)
    }


@pytest.mark.slow
def test_a_seed_takes_what_vllm_would_spawn_and_leaves_its_plugins_to_each(tmp_path: Path) -> None:
    lines = run(
        tmp_path,
        """
def work():
    import vllm.plugins
    print("plugins are loaded:", vllm.plugins.plugins_loaded, flush=True)

if __name__ == "__main__":
    import importlib
    importlib.reload(forking)
    import vllm.plugins
    from vllm.utils import system_utils
    vllm.plugins.plugins_loaded = True
    print(forking.start())
    for method in ("spawn", "fork"):
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = method
        made = system_utils.get_mp_context()
        print(method, made.get_start_method(), type(made).__module__)
    start(work).join()
""",
        VLLM_LOGGING_STREAM="ext://sys.stderr",
    )

    assert lines == [
        "True",
        "spawn spawn vllm_bridge.forking",
        "fork fork multiprocessing.context",
        "plugins are loaded: False",
    ]
