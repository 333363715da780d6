"""Long tasks of jobs: what is told of them, and what their faults become."""

import asyncio
import errno
from collections.abc import Sequence
from typing import Any

import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import task
from vllm_bridge.rpc.call import Call


class Heard:
    """The other side of a call."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def notify(self, method: str, params: dict[str, Any]) -> None:
        assert method == "progress"
        self.told.append(params)

    def emit(self, row: list[Any]) -> None:
        raise AssertionError(row)

    def pack(self, id: int, text: str, token_ids: Sequence[int]) -> None:
        raise AssertionError(text)

    def engine_died(self) -> None:
        raise AssertionError


def ran(work: Any) -> tuple[Any, list[dict[str, Any]]]:
    heard = Heard()

    async def run() -> Any:
        return await task.run(Call(7, heard), work)

    return asyncio.run(run()), heard.told


def test_what_begins_and_what_ends_is_told_with_its_figures() -> None:
    def work(tell: task.Telling) -> str:
        tell("layers", 0, 2, loss=0.5)
        tell("layers", 1, 2)
        tell("layers", 2, 2)
        tell("writing")
        return "made"

    result, told = ran(work)
    assert result == "made"
    assert all(one["id"] == 7 for one in told)
    # What is told too fast for anybody to read is left out, but for ends.
    phases = [(one["phase"], one.get("done")) for one in told]
    assert phases[-1] == ("writing", None)
    assert ("layers", 2) in phases
    assert phases[0] == ("starting", None)
    assert phases.index(("layers", 2)) < phases.index(("writing", None))


def test_the_time_that_is_left_is_that_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    heard = Heard()

    async def run() -> None:
        nonlocal now
        tell = task.Telling(Call(1, heard))
        tell("layers", 2, 12)
        now = 110.0
        tell("layers", 4, 12)
        await asyncio.sleep(0)

    asyncio.run(run())
    # Two of them took ten seconds, and eight are left.
    assert heard.told[-1]["seconds_left"] == 40.0


def test_a_task_that_tells_nothing_is_known_to_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "HEARTBEAT", 0.0)
    heard = Heard()

    async def run() -> None:
        beating = asyncio.create_task(task._beat(task.Telling(Call(1, heard))))
        while len(heard.told) < 3:
            await asyncio.sleep(0)
        beating.cancel()

    asyncio.run(run())
    assert {one["phase"] for one in heard.told} == {"starting"}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/out/model"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (MemoryError(), "out_of_memory"),
    ],
)
def test_what_the_machine_lacks_is_an_error_of_its_own(fault: Exception, reason: str) -> None:
    def work(_tell: task.Telling) -> None:
        raise fault

    with pytest.raises(BridgeError) as raised:
        ran(work)
    assert raised.value.reason == reason


def test_other_faults_stay_what_they_are() -> None:
    def work(_tell: task.Telling) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    with pytest.raises(FileNotFoundError):
        ran(work)
