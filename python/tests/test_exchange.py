"""Requests and answers of an ASGI app that does as it is told, without vLLM."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.rpc.call import Row
from vllm_bridge.serving import exchange as exchanges
from vllm_bridge.serving.app import Adapters, Apps, Engine
from vllm_bridge.serving.exchange import App, Exchange, HttpParams, Receive, Send, Settings

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream")],
}
HEAD: Row = [7, 200, [("content-type", "text/event-stream")]]


def body(text: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


def made(credit: int = 8, **params: Any) -> tuple[Exchange, list[Row]]:
    rows: list[Row] = []
    given = HttpParams(method="POST", path="/v1/x", model="m", credit=credit, **params)
    return Exchange(7, given, rows.append), rows


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0)


def streaming(pieces: list[bytes], sent: list[bytes]) -> App:
    async def app(_scope: dict[str, Any], _receive: Receive, send: Send) -> None:
        await send(START)
        for piece in pieces:
            await send(body(piece))
            sent.append(piece)
        await send(body(b"", more=False))

    return app


def test_the_app_gets_the_request_and_its_answer_is_the_result() -> None:
    seen: dict[str, Any] = {}

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        seen.update(scope)
        seen["message"] = await receive()
        await send({"type": "http.response.start", "status": 404, "headers": [(b"a", b"\xe9")]})
        await send(body(b"no", more=False))

    asked, rows = made(query="a=1", headers=[("Content-Type", "application/json")], body=b"{}")
    answer = run(asked.run(app))
    assert answer == {"status": 404, "headers": [("a", "é")], "body": b"no"}
    assert rows == []
    assert (seen["method"], seen["path"], seen["query_string"]) == ("POST", "/v1/x", b"a=1")
    assert seen["headers"] == [(b"content-type", b"application/json")]
    assert seen["message"] == {"type": "http.request", "body": b"{}", "more_body": False}


def test_what_comes_bit_by_bit_leaves_so_and_the_result_has_the_rest() -> None:
    async def app(_scope: dict[str, Any], _receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b"one"))
        await send(body(b""))
        await send(body(b"two"))
        await send(body(b"three", more=False))

    asked, rows = made()
    assert run(asked.run(app))["body"] == b"three"
    assert rows == [HEAD, [7, b"one"], [7, b"two"]]


def test_without_credit_the_app_waits() -> None:
    async def reads_slowly() -> None:
        sent: list[bytes] = []
        asked, rows = made(credit=2)
        task = asyncio.ensure_future(asked.run(streaming([b"1", b"2", b"3"], sent)))
        await until(lambda: len(rows) == 2)
        await asyncio.sleep(0.01)
        assert (rows, sent) == ([HEAD, [7, b"1"]], [b"1"])
        asked.grant(1)
        await until(lambda: len(rows) == 3)
        await asyncio.sleep(0.01)
        assert sent == [b"1", b"2"]
        assert not task.done()
        asked.grant(8)
        await task
        assert rows[3:] == [[7, b"3"]]

    run(reads_slowly())


@pytest.mark.parametrize("waits_for_credit", [True, False])
def test_cancelling_it_tells_the_app_and_waits_for_its_end(waits_for_credit: bool) -> None:
    async def cancels() -> list[str]:
        heard: list[str] = []

        async def app(_scope: dict[str, Any], receive: Receive, send: Send) -> None:
            await receive()
            await send(START)
            if waits_for_credit:
                await send(body(b"one"))
                await send(body(b"two"))
                heard.append("sent")
            heard.append((await receive())["type"])
            await asyncio.sleep(0.01)
            heard.append("ended")
            raise RuntimeError("nobody is told of this")

        asked, _rows = made(credit=1)
        task = asyncio.ensure_future(asked.run(app))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return heard

    disconnected = ["http.disconnect", "ended"]
    assert run(cancels()) == (["sent", *disconnected] if waits_for_credit else disconnected)


def test_an_app_that_does_not_hear_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "GRACE", 0.01)

    async def cancels() -> bool:
        ended = asyncio.Event()

        async def app(_scope: dict[str, Any], _receive: Receive, _send: Send) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        asked, _rows = made()
        task = asyncio.ensure_future(asked.run(app))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await ended.wait()

    assert run(cancels())


class Ending:
    """An ``AsyncLLM`` whose engine ends during a request, as vLLM tells of it."""

    def __init__(self, *ends: Any) -> None:
        self._ends = ends

    async def generate(self, _prompt: Any, _params: Any, _id: str) -> AsyncIterator[Any]:
        for end in self._ends:
            if isinstance(end, Exception):
                raise end
            yield end


@pytest.mark.parametrize("method", ["generate", "encode"])
def test_an_app_may_name_what_it_gives_the_engine_as_vllm_does(method: str) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    ours, theirs = (
        [*inspect.signature(getattr(each, method)).parameters][:4] for each in (Engine, AsyncLLM)
    )
    assert ours == theirs


@pytest.mark.parametrize("is_cut_off", [True, False])
def test_what_an_app_makes_of_the_end_of_its_engine_is_no_answer(is_cut_off: bool) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    cut_off = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="abort")])
    end = cut_off if is_cut_off else EngineDeadError()
    engine = Engine(Ending(SimpleNamespace(outputs=[]), end))

    async def app(_scope: dict[str, Any], _receive: Receive, send: Send) -> None:
        await send(START)
        try:
            async for _output in engine.generate(None, None, "cmpl-1"):
                await send(body(b"a delta"))
        except EngineDeadError:
            await send(body(b"an error of the app's own"))
        await send(body(b"", more=False))

    apps = Apps(None, ())
    apps._made[Settings()] = app
    asked, rows = made()
    submitted: list[str] = []
    answer, became = run(apps.serve(asked, Settings(), "m", None, submitted.append))
    assert rows == [HEAD, [7, b"a delta"]]
    assert answer["body"] == b""
    assert (became.cut_off is cut_off) == is_cut_off
    assert isinstance(became.fault, EngineDeadError) != is_cut_off
    assert submitted == ["cmpl-1"]


def test_an_app_that_is_prepared_is_made_once_and_what_is_wrong_is_told_to_who_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_for: list[Settings] = []

    async def answers(_scope: dict[str, Any], _receive: Receive, send: Send) -> None:
        await send(START)
        await send(body(b"", more=False))

    async def make(_llm: Any, _tasks: tuple[str, ...], settings: Settings) -> App:
        made_for.append(settings)
        if settings.tool_call_parser is not None:
            raise BridgeError("invalid_option", "There is no such parser.")
        return answers

    async def scenario() -> None:
        apps = Apps(None, ())
        apps.prepare([Settings(), Settings(tool_call_parser="none")])
        await asyncio.wait(apps._preparing)
        assert made_for == [Settings(), Settings(tool_call_parser="none")]
        await apps.serve(made()[0], Settings(), "m", None, lambda _name: None)
        assert len(made_for) == 2
        with pytest.raises(BridgeError, match="no such parser"):
            await apps.serve(
                made()[0], Settings(tool_call_parser="none"), "m", None, lambda _name: None
            )

    monkeypatch.setattr("vllm_bridge.serving.app._make", make)
    run(scenario())


@pytest.mark.parametrize(
    ("lora", "there"), [(None, {}), ("the adapter's request", {"m": "the adapter's request"})]
)
def test_an_app_may_name_the_adapter_that_a_request_is_for(lora: Any, there: Any) -> None:
    seen: list[Any] = []

    async def app(_scope: dict[str, Any], _receive: Receive, send: Send) -> None:
        seen.extend((dict(adapters), "m" in adapters, "another" in adapters, len(adapters)))
        await send(START)
        await send(body(b"", more=False))

    adapters = Adapters()
    apps = Apps(None, ())
    apps._made[Settings()] = app
    run(apps.serve(made()[0], Settings(), "m", lora, lambda _name: None))
    assert seen == [there, bool(there), False, len(there)]
