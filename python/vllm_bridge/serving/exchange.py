"""One HTTP request as an ASGI app sees it, and what the app answers, on its way to Elixir.

Elixir owns the socket. The app gets the request in one piece, and is told that the client has gone
when Elixir cancels. What it answers at once is the result of the call. Of what it answers bit by
bit the head and each piece are rows of ``deltas``, under credit as those of any stream: without
credit the app waits, and vLLM merges meanwhile what it makes for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Annotated, Any

import msgspec

from vllm_bridge.lora import LoRA
from vllm_bridge.rpc.call import Row

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

# How long an app may take to end once its client has gone, in seconds.
GRACE = 5.0


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How the app is to be: vLLM's options of its server, by its names."""

    tool_call_parser: str | None = None
    chat_template: str | None = None


class PrepareParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``prepare_http``; see guides/protocol.md."""

    settings: Settings = Settings()


class HttpParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``http_request``; see guides/protocol.md."""

    method: str
    path: str
    model: str
    credit: Annotated[int, msgspec.Meta(ge=1)]
    query: str = ""
    headers: list[tuple[str, str]] = []
    body: bytes = b""
    settings: Settings = Settings()
    lora_request: LoRA | None = None
    timeout: float | None = None
    queue_timeout: float | None = None


class Exchange:
    """A request and its answer.

    Args:
        id: the request's id
        params: what Elixir sent
        emit: takes a row that is to leave with this step's frame
    """

    def __init__(self, id: int, params: HttpParams, emit: Callable[[Row], None]) -> None:
        self._id = id
        self._params = params
        self._emit = emit
        self._credit = params.credit
        self._granted = asyncio.Event()
        self._gone = asyncio.Event()
        self._is_read = False
        self._status = 0
        self._headers: list[tuple[str, str]] = []
        # Whether the head is on its way, and what is not yet of the body.
        self._is_begun = False
        self._rest: list[bytes] = []

    def grant(self, count: int) -> None:
        """Elixir has taken ``count`` rows."""
        self._credit += count
        self._granted.set()

    async def run(self, app: App) -> dict[str, Any]:
        """Has ``app`` answer; gives the head, and of the body what was in no row.

        Cancelling it tells the app that the client has gone, and returns when the app has ended:
        nothing of it is left in vLLM then.
        """
        task = asyncio.ensure_future(app(self._scope(), self._receive, self._send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._gone.set()
            self._granted.set()
            task.add_done_callback(_forget)
            await asyncio.wait((task,), timeout=GRACE)
            task.cancel()
            raise
        return {
            "status": self._status,
            "headers": self._headers,
            "body": b"".join(self._rest),
        }

    def _scope(self) -> dict[str, Any]:
        params = self._params
        headers = ((n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in params.headers)
        return {
            "type": "http",
            # A later one has responses find out by a failing `send` that the client has gone.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": params.method,
            "scheme": "http",
            "path": params.path,
            "raw_path": params.path.encode(),
            "query_string": params.query.encode(),
            "root_path": "",
            "headers": list(headers),
            "client": None,
            "server": None,
            "state": {},
        }

    async def _receive(self) -> Message:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._params.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        match message:
            case {"type": "http.response.start", "status": int(status)}:
                self._status = int(status)
                self._headers = _texts(message)
            case {"type": "http.response.body", "more_body": True}:
                if body := message.get("body"):
                    if not self._is_begun:
                        self._is_begun = True
                        await self._row([self._status, self._headers])
                    await self._row([bytes(body)])
            case {"type": "http.response.body"}:
                self._rest.append(bytes(message.get("body", b"")))

    async def _row(self, row: Row) -> None:
        while self._credit == 0 and not self._gone.is_set():
            self._granted.clear()
            await self._granted.wait()
        if not self._gone.is_set():
            self._credit -= 1
            self._emit([self._id, *row])


def _forget(task: asyncio.Future[None]) -> None:
    # What an app ends with that nobody listens to.
    if not task.cancelled():
        task.exception()


def _texts(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    headers = message.get("headers", ())
    return [(bytes(n).decode("latin-1"), bytes(v).decode("latin-1")) for n, v in headers]
