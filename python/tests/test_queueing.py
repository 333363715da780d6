"""What waits in vLLM's scheduler, on a real engine that computes one request at a time."""

import asyncio
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest

from running import GREEDY, Running
from vllm_bridge.beam_search import SearchParams
from vllm_bridge.engine.engine import GenerateParams
from vllm_bridge.queueing import METHOD
from vllm_bridge.rpc.protocol import pack_u32

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUMBERS = itertools.count()
ENDLESS = {"max_tokens": 8000, "ignore_eos": True, "temperature": 1.0}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    environment = dict(os.environ)
    running = Running()
    running.load(max_num_seqs=1, max_num_batched_tokens=16)
    yield running
    running.stop()
    os.environ.clear()
    os.environ.update(environment)


class Request:
    """A request under way, by its id."""

    def __init__(self, running: Running, prompt: Any, **params: Any) -> None:
        self.id = f"request {next(NUMBERS)}"
        self._engine = running.engine
        self.task = asyncio.ensure_future(
            self._engine.generate(self.id, GenerateParams(prompt, GREEDY | params))
        )

    async def waits(self) -> bool:
        return await self._engine.waits(self.id)

    async def begun(self) -> None:
        while await self.waits():
            await asyncio.sleep(0)

    async def submitted(self) -> None:
        output_processor = self._engine._llm.output_processor
        while self.id not in output_processor.external_req_ids:
            await asyncio.sleep(0)

    async def cancel(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


def test_what_has_no_turn_yet_waits(running: Running) -> None:
    async def scenario() -> None:
        first = Request(running, "The", **ENDLESS)
        await first.begun()
        others = [Request(running, "The", n=n, temperature=1.0) for n in (1, 2)]
        for other in others:
            await other.submitted()
            assert await other.waits()
        assert not await first.waits()
        await first.cancel()
        for other in others:
            await other.task

    running.run(scenario())


def test_one_of_several_completions_is_a_beginning(running: Running) -> None:
    async def scenario() -> None:
        # One of the two is computed, the other has to wait.
        request = Request(running, "The", n=2, **ENDLESS)
        await request.begun()
        assert not await request.waits()
        await request.cancel()

    running.run(scenario())


def test_a_prompt_that_is_computed_in_parts_does_not_wait(running: Running) -> None:
    async def scenario() -> None:
        # 250 steps before the first token.
        tokens = {"prompt_token_ids": pack_u32([7 + index % 90 for index in range(4000)])}
        request = Request(running, tokens, max_tokens=1)
        await request.submitted()
        await request.begun()
        (state,) = running.engine._llm.output_processor.request_states.values()
        assert state.is_prefilling
        assert not await request.waits()
        await request.cancel()

    running.run(scenario())


def test_a_search_that_has_begun_does_not_wait(running: Running) -> None:
    async def scenario() -> None:
        search = SearchParams(
            prompt="The capital of", beam_search_params={"beam_width": 2, "max_tokens": 500}
        )
        task = asyncio.ensure_future(running.engine.beam_search("search", search))
        queue = running.engine._queue
        assert queue is not None
        while await queue.waits("search"):
            await asyncio.sleep(0)
        # Of the beams of each step at most one is computed at a time.
        for _ in range(20):
            assert not await running.engine.waits("search")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert queue._submitted == {}

    running.run(scenario())


async def held(running: Running, ids: list[str]) -> dict[str, bool]:
    (answer,) = await running.engine._llm.engine_core.call_utility_all_async(METHOD, ids)
    return dict(answer)


def test_the_scheduler_does_not_know_what_never_came(running: Running) -> None:
    assert running.run(held(running, ["no such request"])) == {}


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_cancelled_is_gone_before_the_next_step(running: Running, n: int) -> None:
    async def scenario() -> None:
        llm = running.engine._llm
        inside = llm.output_processor.external_req_ids
        runs = Request(running, "The", **ENDLESS | {"n": n})
        await runs.begun()
        waits = Request(running, "The", **ENDLESS)
        await waits.submitted()
        ids = [*inside[runs.id], *inside[waits.id]]
        known = await held(running, ids)
        assert set(known) == set(ids)
        assert not known[inside[waits.id][0]]

        # The questions come behind the aborts, and are answered between two steps.
        await waits.cancel()
        assert set(await held(running, ids)) == set(inside[runs.id])
        await runs.cancel()
        assert await held(running, ids) == {}
        assert llm.get_num_unfinished_requests() == 0

    running.run(scenario())


def test_a_prompt_that_is_read_in_parts_has_its_seed(running: Running) -> None:
    # Sixteen tokens at a time; between two parts vLLM samples one that it throws away.
    prompt = {"prompt_token_ids": pack_u32(range(5, 55))}

    def text(seed: int) -> str:
        answer = running.complete(prompt, temperature=1.0, max_tokens=24, seed=seed)
        return str(answer["text"])

    in_parts = text(1)
    # What is cached is not read again: then there are no parts.
    assert text(1) == in_parts
    assert text(2) != in_parts
