import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_bridge import heartbeat

PYTHON = Path(__file__).resolve().parents[1]
WAIT_SECONDS = 60

# What a process of vLLM's does at its start, and then what its main thread does.
CHILD = """
import multiprocessing, sys, threading, time
from vllm_bridge import heartbeat

def work():
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        pass

def rest():
    time.sleep(0.05)

def child(what):
    heartbeat.LOOK_SECONDS = 0.01
    heartbeat.start()
    heartbeat.start()
    print("started", flush=True)
    if what == "stand still":
        threading.Event().wait()
    while True:
        work()
        rest()

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1],)).start()
"""


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    os.mkfifo(tmp_path / "alive")
    monkeypatch.setenv("EX_VLLM_RUN", str(tmp_path))
    return tmp_path


class FakeCore:
    def __init__(self) -> None:
        self.outputs: list[str] = []

    async def get_output_async(self) -> str:
        return self.outputs.pop()


def engine(core: FakeCore) -> SimpleNamespace:
    processor = SimpleNamespace(get_num_unfinished_requests=lambda: 2)
    return SimpleNamespace(engine_core=core, output_processor=processor)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_each_message_of_the_core_is_a_step() -> None:
    core = FakeCore()
    figures = heartbeat.Heartbeat(engine(core))
    core.outputs = ["second", "first"]
    assert figures.read() == {"steps": 0, "beats": 0, "unfinished": 2}
    assert asyncio.run(core.get_output_async()) == "first"
    assert asyncio.run(core.get_output_async()) == "second"
    assert figures.read()["steps"] == 2


def test_only_processes_of_vllm_count(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiprocessing.parent_process() is None
    heartbeat.start()
    assert list((run_folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("moves", [True, False])
def test_a_process_that_computes_has_beats_and_one_that_waits_has_none(
    run_folder: Path, tmp_path: Path, moves: bool
) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    what = "compute" if moves else "stand still"
    lifeline = os.open(run_folder / "alive", os.O_RDWR)
    env = os.environ | {"PYTHONPATH": str(PYTHON)}
    parent = subprocess.Popen([sys.executable, script, what], env=env, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        figures = heartbeat.Heartbeat(engine(FakeCore()))
        (_file,) = (run_folder / "tmp").glob("heartbeat.*")
        assert eventually(lambda: figures.read()["beats"] > 0)
        if moves:
            assert eventually(lambda: figures.read()["beats"] > 20)
        else:
            # On its way to where it stays it may have been seen at several places.
            still = settled(figures)
            assert still < 20
            time.sleep(1)
            assert figures.read()["beats"] == still
        # Closed, the lifeline ends the child, as it does when a guard dies.
    finally:
        os.close(lifeline)
        parent.kill()
        parent.wait()


def settled(figures: heartbeat.Heartbeat) -> int:
    last = -1
    while (beats := figures.read()["beats"]) != last:
        last = beats
        time.sleep(0.5)
    return last
