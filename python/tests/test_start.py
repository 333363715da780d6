"""An engine that dies while it starts."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine.async_llm import AsyncLLM

from running import Running
from vllm_bridge import quantization
from vllm_bridge.diagnosis import RUN_FOLDER
from vllm_bridge.errors import BridgeError

pytestmark = pytest.mark.engine


async def killed(llm: Any) -> None:
    """Asks something of an engine that dies when it has the question."""
    (process,) = llm.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGSTOP)
    answer = asyncio.ensure_future(llm.is_sleeping())
    while not llm.engine_core.utility_results:
        await asyncio.sleep(0)
    os.kill(process.pid, signal.SIGKILL)
    await answer


async def killed_and_noted(llm: Any, _online: str | None, _kernel: str | None) -> None:
    await killed(llm)


@pytest.mark.parametrize(
    ("owner", "question", "dying"),
    [
        (AsyncLLM, "get_supported_tasks", killed),
        (quantization, "note", killed_and_noted),
    ],
)
def test_it_is_told_of_whatever_was_asked_last(
    owner: Any, question: str, dying: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "log").write_text("the last line\n")
    monkeypatch.setenv(RUN_FOLDER, str(tmp_path))
    monkeypatch.setattr(owner, question, dying)
    running = Running()
    with pytest.raises(BridgeError) as caught:
        running.load()
    assert caught.value.reason == "engine_dead"
    assert caught.value.details["log"] == ["the last line"]
    assert asyncio.all_tasks(running.loop) == set()
