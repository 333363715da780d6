import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT
from vllm_bridge.patches import ranks

# An engine core with two ranks that wait for each other and hear no signal but the last.
CORE = """
import logging, multiprocessing, signal, sys, time
from multiprocessing import connection
from types import SimpleNamespace
from vllm_bridge.patches.ranks import apply, watch

def rank():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)

def load(ranks):
    def wait_for_ready(loading):
        connection.wait([rank.proc.sentinel for rank in loading])
        raise RuntimeError("WorkerProc initialization failed")

    module = SimpleNamespace(
        MultiprocExecutor=type("MultiprocExecutor", (), {"start_worker_monitor": rank}),
        WorkerProc=type("WorkerProc", (), {"wait_for_ready": staticmethod(wait_for_ready)}),
    )
    sys.modules["vllm.v1.executor.multiproc_executor"] = module
    apply()
    module.WorkerProc.wait_for_ready([SimpleNamespace(proc=rank) for rank in ranks])

if __name__ == "__main__":
    logging.basicConfig()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, name=f"Rank-{n}") for n in range(2)]
    for process in ranks:
        process.start()
    print(*[process.pid for process in ranks], flush=True)
    if "loading" in sys.argv:
        load(ranks)
    executor = lambda: SimpleNamespace(shutting_down="ending" in sys.argv)
    watch(executor, ranks)
    for process in ranks:
        process.kill()
    sys.exit(42)
"""


def core(*arguments: str) -> tuple[int, str, list[int]]:
    """How the engine core ends after its second rank was killed, what it says, and its ranks."""
    with subprocess.Popen(
        [sys.executable, "-c", CORE, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        os.kill(pids[1], signal.SIGKILL)
        # Both pipes close with the last of the three.
        _, words = process.communicate(timeout=60)
        return process.returncode, words, pids


@pytest.mark.parametrize("when", ["serving", "loading"])
def test_a_rank_that_dies_takes_the_others_and_the_engine_with_it(when: str) -> None:
    status, words, pids = core(when)
    assert status == 1
    assert "the rank Rank-1 died: SIGKILL" in words
    assert not any(os.path.exists(f"/proc/{pid}/fd/0") for pid in pids)


def test_ranks_that_are_being_ended_are_left_to_vllm() -> None:
    status, words, _pids = core("ending")
    assert status == 42
    assert "died" not in words


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "status 0"), (3, "status 3"), (-11, "SIGSEGV"), (-6, "SIGABRT"), (-63, "signal 63")],
)
def test_how_a_process_ended(code: int, words: str) -> None:
    assert ranks.ended(code) == words


@pytest.mark.parametrize(("inline", "tolerant"), [(True, False), (False, True)])
def test_who_can_do_without_a_rank_does_as_vllm_does(
    monkeypatch: pytest.MonkeyPatch, inline: bool, tolerant: bool
) -> None:
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

    seen = []
    monkeypatch.setattr(WorkerProc, "wait_for_ready", staticmethod(WorkerProc.wait_for_ready))
    monkeypatch.setattr(
        MultiprocExecutor,
        "start_worker_monitor",
        lambda self, inline=False: seen.append((self, inline)),
    )
    ranks.apply()
    ranks.apply()
    executor = SimpleNamespace(
        parallel_config=SimpleNamespace(enable_fault_tolerance=tolerant), workers=None
    )
    MultiprocExecutor.start_worker_monitor(executor, inline)
    assert seen == [(executor, inline)]
