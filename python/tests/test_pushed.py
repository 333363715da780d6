"""Outputs that vLLM's handler hands over itself, without a task that wakes for each."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from test_finish import output
from vllm_bridge import diagnosis
from vllm_bridge.engine import pushed
from vllm_bridge.engine.engine import Engine, GenerateParams
from vllm_bridge.errors import BridgeError
from vllm_bridge.finish import Meaning
from vllm_bridge.outputs import Growing
from vllm_bridge.queueing import Queue


class LLM:
    """As much of an ``AsyncLLM`` as is used, whose outputs a test puts."""

    def __init__(self, *already: Any) -> None:
        self.collector = RequestOutputCollector(RequestOutputKind.DELTA, "7-inside")
        self.aborted: list[tuple[str, bool]] = []
        self.added = asyncio.Event()
        for one in already:
            self.collector.put(one)

    async def add_request(self, request_id: str, prompt: Any, params: Any, **arguments: Any) -> Any:
        assert (request_id, arguments["priority"]) == ("7", 3)
        self.added.set()
        return self.collector

    async def abort(self, request_id: str, internal: bool = False) -> None:
        self.aborted.append((request_id, internal))


Scenario = Callable[[LLM, "asyncio.Task[None]"], Awaitable[None]]


def run(scenario: Scenario, take: Callable[[Any], bool], *already: Any) -> LLM:
    async def main() -> LLM:
        llm = LLM(*already)
        task = asyncio.ensure_future(pushed.generate(llm, "The", "greedy", "7", take, priority=3))
        await llm.added.wait()
        await asyncio.sleep(0)
        await asyncio.wait_for(scenario(llm, task), 10)
        return llm

    return asyncio.run(main())


def test_the_installed_vllm_hands_them_over_as_is_known_here() -> None:
    assert pushed.is_possible()


def test_each_is_taken_when_it_is_put_also_what_came_before() -> None:
    taken: list[str] = []

    def take(one: Any) -> bool:
        taken.append(one.outputs[0].text)
        return False

    async def scenario(llm: LLM, task: "asyncio.Task[None]") -> None:
        assert taken == ["Par"]
        llm.collector.put(output(("is", None)))
        assert taken == ["Par", "is"]
        assert not task.done()
        llm.collector.put(output((".", "stop")))
        llm.collector.put(output(("too late", None)))
        await task

    llm = run(scenario, take, output(("Par", None)))
    assert taken == ["Par", "is", "."]
    assert llm.aborted == []


def test_who_stops_waiting_aborts_the_request() -> None:
    async def scenario(llm: LLM, task: "asyncio.Task[None]") -> None:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Of it vLLM says one thing more.
        llm.collector.put(output(("", "abort")))

    assert run(scenario, lambda one: False).aborted == [("7-inside", True)]


def test_what_ends_before_its_time_is_aborted() -> None:
    async def scenario(llm: LLM, task: "asyncio.Task[None]") -> None:
        llm.collector.put(output(("a", None), ("b", None)))
        await task

    assert run(scenario, lambda one: True).aborted == [("7-inside", True)]


def test_a_fault_is_the_request_s_and_not_the_handler_s() -> None:
    def fail(_output: Any) -> bool:
        raise ZeroDivisionError("a fault")

    async def scenario(llm: LLM, task: "asyncio.Task[None]") -> None:
        llm.collector.put(output(("a", None)))
        with pytest.raises(ZeroDivisionError):
            await task

    assert run(scenario, fail).aborted == [("7-inside", True)]


def test_in_an_engine_that_died_nothing_is_aborted() -> None:
    async def scenario(llm: LLM, task: "asyncio.Task[None]") -> None:
        llm.collector.put(EngineDeadError())
        with pytest.raises(EngineDeadError):
            await task

    assert run(scenario, lambda one: False).aborted == []


def test_deltas_grow_to_the_whole() -> None:
    delivered: list[str] = []
    whole = Growing(lambda one: delivered.extend(each.text for each in one.outputs))
    steps = [
        output(("a", None)),
        output(("b", None), ("x", None)),
        output(("c", None), tokens=2),
        output(("d", None), ("y", "stop")),
        output(("e", None)),
        output(("f", "length")),
    ]
    assert [whole.take(one) for one in steps] == [False] * 6
    assert delivered == ["a", "b", "x", "c", "d", "y", "e", "f"]
    said = [(each.index, each.text, each.finish_reason) for each in whole.output.outputs]
    assert said == [(0, "abcdef", "length"), (1, "xy", "stop")]
    assert [list(each.token_ids) for each in whole.output.outputs] == [
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0],
    ]
    assert whole.output.finished


def test_an_early_end_is_no_delta_and_has_what_came() -> None:
    delivered: list[Any] = []
    whole = Growing(delivered.append)
    assert not whole.take(output(("Par", None)))
    assert not whole.take(output(("is", None)))
    assert whole.take(output(("", "abort")))
    assert len(delivered) == 2
    assert whole.early is Meaning.CUT_OFF
    assert whole.output.outputs[0].text == "Paris"


@pytest.mark.parametrize(("end", "reason"), [("abort", "engine_dead"), ("error", "invalid_option")])
def test_a_stream_that_vllm_ends_is_answered_with_the_error(
    end: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_LOG_PATIENCE_SECONDS", 0)
    delivered: list[str] = []

    async def nothing(*_given: Any) -> None: ...

    async def rendered(*_given: Any) -> Any:
        return {"type": "token"}

    async def ask() -> LLM:
        llm = LLM()
        params = SimpleNamespace(structured_outputs="grammar", prompt_logprobs=None)
        engine: Any = object.__new__(Engine)
        engine._llm, engine._pooler, engine._pushes = llm, None, True
        engine._asleep, engine._sleeps = False, 0
        engine._info, engine._stopped = {"scheduling_policy": "priority"}, asyncio.Event()
        engine._sampling = SimpleNamespace(make=lambda *_given, **_more: params)
        engine._loras, engine._render = SimpleNamespace(request=nothing), rendered
        engine._queue = Queue(llm)
        task = asyncio.ensure_future(
            engine.generate(
                "7", GenerateParams("The", priority=3), lambda one: delivered.append(texts(one))
            )
        )
        await llm.added.wait()
        llm.collector.put(output(("Par", None), ("x", None)))
        llm.collector.put(output(("is", end), ("y", None)))
        with pytest.raises(BridgeError) as caught:
            await asyncio.wait_for(task, 10)
        assert caught.value.reason == reason
        kept = caught.value.details["outputs"]
        assert [(one["text"], one["finish_reason"]) for one in kept] == [
            ("Paris", end),
            ("xy", None),
        ]
        return llm

    # One of its completions goes on.
    assert asyncio.run(ask()).aborted == [("7-inside", True)]
    assert delivered == ["Par x"]


def texts(one: Any) -> str:
    return " ".join(each.text for each in one.outputs)
