"""How requests end that vLLM ended, and not their caller."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.outputs import (
    CompletionOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestError,
    RequestOutput,
)
from vllm.v1.engine import FinishReason

from vllm_bridge import diagnosis
from vllm_bridge.engine.engine import Engine, warm_up
from vllm_bridge.errors import BridgeError
from vllm_bridge.finish import MEANINGS, Meaning, early
from vllm_bridge.queueing import Queue, Watched

PREFIX = "(EngineCore pid=42) ERROR 11-20 19:30:52 [scheduler.py:2190] "


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EX_VLLM_RUN", str(tmp_path))
    return tmp_path / "log"


def output(*ends: tuple[str, str | None], tokens: int = 1) -> RequestOutput:
    """A step of a request, from a text and a finish reason for each completion."""
    return RequestOutput(
        request_id="7",
        prompt="The",
        prompt_token_ids=[1],
        prompt_logprobs=None,
        outputs=[
            CompletionOutput(
                index=index,
                text=text,
                token_ids=list(range(tokens)),
                cumulative_logprob=None,
                logprobs=None,
                finish_reason=reason,
            )
            for index, (text, reason) in enumerate(ends)
        ],
        finished=all(reason is not None for _, reason in ends),
    )


def pooled(numbers: list[float], error: RequestError | None = None) -> PoolingRequestOutput[Any]:
    return PoolingRequestOutput(
        "7", PoolingOutput(torch.tensor(numbers)), [1], 0, finished=True, error=error
    )


def test_every_finish_reason_of_vllm_has_a_meaning() -> None:
    assert set(MEANINGS) == {str(reason) for reason in FinishReason}


@pytest.mark.parametrize(
    ("given", "meaning"),
    [
        (output(("a", None)), None),
        (output(("a", "stop"), ("b", "length"), ("c", "repetition")), None),
        (output(("a", "stop"), ("b", "abort")), Meaning.CUT_OFF),
        (output(("a", "error")), Meaning.FAILED),
        (output(("a", "of a later version")), Meaning.FAILED),
        (pooled([0.5]), None),
        (pooled([]), Meaning.CUT_OFF),
        (pooled([], RequestError("code", "A cache miss.")), Meaning.FAILED),
    ],
)
def test_what_an_end_means(given: Any, meaning: Meaning | None) -> None:
    assert early(given) is meaning


def ended(meaning: Meaning, given: Any, **how: bool) -> BridgeError:
    how = {"structured": False, "asleep": False} | how
    return asyncio.run(diagnosis.early_end(meaning, "7", given, **how))


def test_the_errors_say_what_happened_and_keep_what_there_is() -> None:
    kept = [{"index": 0, "text": "Par", "token_ids": [0, 1], "finish_reason": "abort"}]
    cut_off = output(("Par", "abort"), tokens=2)
    dead = ended(Meaning.CUT_OFF, cut_off)
    assert (dead.reason, dead.details) == ("engine_dead", {"outputs": kept})
    assert ended(Meaning.CUT_OFF, cut_off, asleep=True).reason == "aborted"
    failed = ended(Meaning.FAILED, output(("Par", "error")))
    assert failed.reason == "internal"
    assert failed.details["outputs"][0]["text"] == "Par"
    missed = ended(Meaning.FAILED, pooled([], RequestError("code", "A cache miss.")))
    assert missed.message.endswith("vLLM says: A cache miss.")


def test_a_grammar_that_cannot_go_on_is_the_callers_with_vllms_own_line(log: Path) -> None:
    log.write_text(
        f"{PREFIX}Failed to advance FSM for request 1_7-1a2b3c4d for tokens 6.\n"
        f"{PREFIX}Unexpected: grammar rejected tokens [6] for request 1_7-1a2b3c4d.\n"
        f"{PREFIX}Unexpected: grammar rejected tokens [5] for request 77-1a2b3c4d.\n"
    )
    error = ended(Meaning.FAILED, output(("", "error")), structured=True)
    assert error.reason == "invalid_option"
    assert error.details["option"] == "structured_outputs"
    assert error.message.endswith(
        "vLLM says: Unexpected: grammar rejected tokens [6] for request 1_7-1a2b3c4d."
    )


def test_of_a_grammar_that_does_not_compile_the_cause_is_told(log: Path) -> None:
    log.write_text(
        f"{PREFIX}Failed to compile grammar for request 7-1a2b3c4d\n"
        f"{PREFIX}Traceback (most recent call last):\n"
        f"{PREFIX}RuntimeError: no such rule\n"
        "(EngineCore pid=42) ERROR 11-20 19:30:53 [core.py:1] ValueError: of another\n"
    )
    error = ended(Meaning.FAILED, output(("", "error")), structured=True)
    assert error.message.endswith(
        "vLLM says: Failed to compile grammar for request 7-1a2b3c4d: no such rule"
    )


def test_a_log_that_says_nothing_of_it_is_waited_for_a_moment(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_LOG_PATIENCE_SECONDS", 0)
    log.write_text(f"{PREFIX}Of another request 8-1a2b3c4d\n")
    assert "vLLM says" not in ended(Meaning.FAILED, output(("", "error"))).message


async def steps(*outputs: RequestOutput, closed: list[bool]) -> AsyncGenerator[RequestOutput, None]:
    try:
        for step in outputs:
            yield step
    finally:
        closed.append(True)


def test_a_stream_delivers_what_came_before_and_ends_with_the_error() -> None:
    delivered: list[str] = []
    closed: list[bool] = []

    async def read() -> None:
        stream = steps(output(("Par", None)), output(("is", "abort")), closed=closed)
        engine = object.__new__(Engine)
        engine._asleep, engine._sleeps, engine._stopped = False, 0, asyncio.Event()
        await engine._whole(
            "7",
            SimpleNamespace(structured_outputs=None),
            stream,
            lambda step: delivered.append(step.outputs[0].text),
        )

    with pytest.raises(BridgeError) as caught:
        asyncio.run(read())
    assert delivered == ["Par"]
    assert closed == [True]
    assert caught.value.reason == "engine_dead"
    (kept,) = caught.value.details["outputs"]
    assert (kept["text"], kept["finish_reason"]) == ("Paris", "abort")


def test_what_a_sleep_has_ended_is_aborted_though_it_hears_of_it_when_the_engine_is_awake() -> None:
    engine = object.__new__(Engine)
    engine._asleep, engine._sleeps, engine._stopped = False, 0, asyncio.Event()
    engine._queue = Queue(None)

    async def ended(sleeps: int) -> BridgeError:
        with engine._submitting("7") as submit:
            submit("7")
            engine._sleeps += sleeps
            part = engine._early_end(Meaning.CUT_OFF, "7", output(("is", "abort")))
            return await asyncio.create_task(part)

    assert asyncio.run(ended(1)).reason == "aborted"
    assert not engine._stopped.is_set()
    assert asyncio.run(ended(0)).reason == "engine_dead"
    assert engine._stopped.is_set()


def test_the_parts_of_a_search_are_watched() -> None:
    class LLM:
        def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
            return steps(output(("", prompt)), closed=[])

    async def ask(*ends: str) -> Meaning | None:
        watched = Watched(LLM(), lambda name: None, asyncio.Event())
        for end in ends:
            assert [step async for step in watched.generate(end, None, "7")]
        return watched.ended_early

    assert asyncio.run(ask("length", "stop")) is None
    assert asyncio.run(ask("length", "abort", "stop")) is Meaning.CUT_OFF


def test_a_part_of_which_a_stopped_engine_says_nothing_is_cut_off() -> None:
    class LLM:
        async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
            submitted.set()
            await asyncio.Event().wait()
            yield

    async def ask() -> Meaning | None:
        stopped = asyncio.Event()
        watched = Watched(LLM(), lambda name: None, stopped)
        step = asyncio.ensure_future(anext(watched.generate("", None, "7")))
        await submitted.wait()
        stopped.set()
        assert (await step).outputs[0].finish_reason == "abort"
        return watched.ended_early

    submitted = asyncio.Event()
    assert asyncio.run(ask()) is Meaning.CUT_OFF


class Warming:
    """An ``AsyncLLM`` that is asked for one token, which ends as it is told."""

    def __init__(self, end: str, max_logprobs: int = 20) -> None:
        self.model_config = SimpleNamespace(is_encoder_decoder=False, max_logprobs=max_logprobs)
        self.renderer = SimpleNamespace(render_cmpl=lambda prompts: prompts)
        self.end = end
        self.asked: list[Any] = []

    def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked.append(params.logprobs)
        return steps(output(("", self.end)), closed=[])


def test_log_probabilities_are_part_of_the_warm_up_where_an_engine_has_them() -> None:
    for max_logprobs, asked in [(20, 1), (-1, 1), (0, None)]:
        llm = Warming("length", max_logprobs)
        asyncio.run(warm_up(llm))
        assert llm.asked == [asked]


def test_a_warm_up_that_is_cut_off_is_no_start() -> None:
    with pytest.raises(BridgeError) as caught:
        asyncio.run(warm_up(Warming("abort")))
    assert caught.value.reason == "engine_dead"
