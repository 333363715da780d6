"""Dispatch: every request becomes a task, every task ends in exactly one response."""

import asyncio
import logging
import os
import platform
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec

from vllm_bridge import PROTOCOL_VERSION, __version__
from vllm_bridge.diagnosis import LOG_LINES, log_lines
from vllm_bridge.errors import BridgeError, internal_error, unknown_name
from vllm_bridge.rpc.call import Call, Row
from vllm_bridge.rpc.connection import Connection
from vllm_bridge.rpc.protocol import (
    DEFAULT_MAX_FRAME,
    Columns,
    Notification,
    ProtocolError,
    Request,
    Response,
    Rows,
    decode,
    encode,
    encode_result,
)
from vllm_bridge.rpc.table import Method, Table
from vllm_bridge.versions import installed_packages

logger = logging.getLogger(__name__)

# How the process ends, seen by Elixir as the port's exit status.
EXIT_OK = 0
EXIT_ENGINE_DEAD = 70  # EX_SOFTWARE
EXIT_PROTOCOL = 76  # EX_PROTOCOL


class HelloParams(msgspec.Struct, forbid_unknown_fields=True):
    protocol: int
    max_frame: int = DEFAULT_MAX_FRAME


class CreditParams(msgspec.Struct):
    id: int
    count: Annotated[int, msgspec.Meta(ge=1)]


class CancelParams(msgspec.Struct):
    id: int


class PingParams(msgspec.Struct):
    n: int


class Server:
    """One connection that serves one table.

    Args:
        exit: ends the process with a status; called when the peer is gone, asks for it, or
            breaks the protocol, and when the engine is dead
    """

    def __init__(
        self, read_fd: int, write_fd: int, table: Table, exit: Callable[[int], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._table = table
        self._methods: dict[str, Method[Any]] = {
            "hello": Method(HelloParams, self._hello),
            **table.methods,
        }
        self._exit = exit
        self._greeted = False
        self._calls: dict[int, Call] = {}
        # What is to leave at the end of this turn of the loop.
        self._rows: list[Row] = []
        self._columns = Columns()
        self._death: asyncio.Task[None] | None = None
        # Requests that were cut off by it, with what there is of their answers.
        self._cut_off: list[tuple[int, BridgeError]] = []
        self._connection = Connection(
            read_fd,
            write_fd,
            max_frame=DEFAULT_MAX_FRAME,
            on_frame=self._on_frame,
            on_close=self._on_close,
        )

    def notify(self, method: str, params: dict[str, Any]) -> None:
        """Tells Elixir something, before anything that may block the loop."""
        self._connection.send(encode(Notification(method, params)))
        self._connection.flush()

    def engine_died(self) -> None:
        """Lets the answers go out that are there, then ends the process.

        What vLLM owes an answer to gets none here: the end of the process answers it, with all
        that the log has by then. Only what was cut off has something to tell itself.
        """
        if self._death is None:
            self._death = self._loop.create_task(self._end_with_engine())

    async def _end_with_engine(self) -> None:
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        if tasks:
            # Callers are not to wait for one that prepares its request.
            await asyncio.wait(tasks, timeout=1)
        log = log_lines()[-LOG_LINES:]
        for id, error in self._cut_off:
            error.details["log"] = log
            self._connection.send(*self._response(id, error, None))
        self._connection.flush()
        how = self._table.exit_summary()
        logger.error("vLLM's engine died%s; the worker ends", how and f" ({how})")
        self._exit(EXIT_ENGINE_DEAD)

    def close(self) -> None:
        self._connection.close()

    def _on_frame(self, payload: bytes | memoryview) -> None:
        match decode(payload):
            case Request() as request:
                self._on_request(request)
            case Notification(method="cancel", params=params):
                self._on_cancel(params)
            case Notification(method="credit", params=params):
                self._on_credit(params)
            case Notification(method="ping", params=params):
                self._on_ping(params)
            case Notification(method="shutdown"):
                self._exit(EXIT_OK)
            case Notification():
                pass  # newer than this version: notifications need no answer
            case Response():
                raise ProtocolError("a response came to the side that answers")

    def _on_close(self, error: BaseException | None) -> None:
        if error is None or isinstance(error, BrokenPipeError):
            self._exit(EXIT_OK)
        else:
            logger.error("the connection ended: %s", error, exc_info=error)
            self._exit(EXIT_PROTOCOL)

    def _on_request(self, request: Request) -> None:
        if request.id in self._calls:
            raise ProtocolError(f"request id {request.id} is in use")
        call = self._calls[request.id] = Call(request.id, self)
        call.task = self._loop.create_task(self._serve(request, call))

    def _on_cancel(self, params: dict[str, Any]) -> None:
        try:
            call = self._calls.get(msgspec.convert(params, CancelParams).id)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"a cancel without an id: {error}") from error
        if call is not None:
            call.end(BridgeError("aborted", "The request was cancelled."))

    def _on_credit(self, params: dict[str, Any]) -> None:
        try:
            credit = msgspec.convert(params, CreditParams)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"a credit that is none: {error}") from error
        call = self._calls.get(credit.id)
        if call is not None and call.on_credit is not None:
            try:
                call.on_credit(credit.count)
            except Exception as fault:  # it sends what had to wait
                call.end(internal_error(fault))

    def _on_ping(self, params: dict[str, Any]) -> None:
        try:
            number = msgspec.convert(params, PingParams).n
        except msgspec.ValidationError as error:
            raise ProtocolError(f"a ping without a number: {error}") from error
        self._connection.send(encode(Notification("pong", {"n": number} | self._table.progress())))

    def emit(self, row: Row) -> None:
        """Has a delta leave with those that come in the same turn of the loop."""
        if not (self._rows or self._columns.texts):
            # All of a step's deltas come within one turn of the loop.
            self._loop.call_soon(self._send_rows)
        self._rows.append(row)

    def pack(self, id: int, text: str, token_ids: Sequence[int]) -> None:
        """The same of a delta that is no more than a text and its tokens, of the first
        completion."""
        columns = self._columns
        if not (columns.texts or self._rows):
            self._loop.call_soon(self._send_rows)
        # First what may fail, so that the columns stay as long as each other.
        count = len(token_ids)
        columns.token_ids += token_ids
        columns.counts.append(count)
        columns.ids.append(id)
        columns.texts.append(text)

    def _send_rows(self) -> None:
        columns, self._columns = self._columns, Columns()
        rows, self._rows = self._rows, []
        # The row that ends a stream comes after what is packed of it.
        if columns.texts:
            self._send_deltas(columns)
        if rows:
            self._send_deltas(Rows(rows))

    def _send_deltas(self, deltas: Columns | Rows) -> None:
        """Sends them in as few frames as they fit in. A request ends by a delta of its that cannot
        be sent; the others of its turn are sent."""
        try:
            payload = encode(deltas.to_message())
        except Exception as fault:
            error = internal_error(fault)
        else:
            if len(payload) <= self._connection.max_frame:
                self._connection.send(payload)
                return
            error = self._too_long(len(payload))
        if len(deltas.ids) > 1:
            for half in deltas.halves():
                self._send_deltas(half)
        elif (call := self._calls.get(deltas.ids[0])) is not None:
            call.end(error)

    async def _serve(self, request: Request, call: Call) -> None:
        call.started = True
        error = call.ended_by
        result: Any = None
        try:
            if error is not None:
                raise error
            if self._connection.congested:
                await self._connection.writable()
            method, params = self._resolve(request)
            result = await method.serve(call, params)
        except asyncio.CancelledError:
            error = call.ended_by or BridgeError("aborted", "The request was cancelled.")
        except BridgeError as bridge_error:
            error = bridge_error
        except Exception as fault:
            logger.exception("a fault while serving %s", request.method)
            error = internal_error(fault)
        # Deltas come before the response that ends them, which tells if one could not be sent.
        self._send_rows()
        error = error or call.ended_by
        del self._calls[request.id]
        if error is not None and error.reason == "engine_dead":
            if "outputs" in error.details:
                self._cut_off.append((request.id, error))
            self.engine_died()
        else:
            self._connection.send(*self._response(request.id, error, result))

    def _response(
        self, id: int, error: BridgeError | None, result: Any
    ) -> tuple[bytes | memoryview, ...]:
        if error is None:
            try:
                pieces = encode_result(id, result)
            except Exception as fault:
                error = internal_error(fault)
            else:
                size = sum(map(len, pieces))
                if size <= self._connection.max_frame:
                    return pieces
                error = self._too_long(size)
        payload = encode(Response(id, error.to_wire(), None))
        if len(payload) > self._connection.max_frame:
            payload = encode(Response(id, BridgeError(error.reason, error.message).to_wire(), None))
        return (payload,)

    def _too_long(self, size: int) -> BridgeError:
        limit = self._connection.max_frame
        return BridgeError(
            "unsupported",
            f"The answer has {size} bytes, more than a frame may have ({limit}). Ask for less "
            "(fewer logprobs, say), or raise `max_frame`.",
            {"bytes": size, "max_frame": limit},
        )

    def _resolve(self, request: Request) -> tuple[Method[Any], Any]:
        """The method of a request, and the params as it takes them."""
        if not self._greeted and request.method != "hello":
            raise BridgeError("protocol", "The first request of a connection must be `hello`.")
        method = self._methods.get(request.method)
        if method is None:
            error = unknown_name("method", request.method, self._methods)
            raise BridgeError("protocol", error.message, error.details)
        names = method.params.__struct_encode_fields__
        for name in request.params:
            if name not in names:
                raise unknown_name(f"parameter of `{request.method}`", name, names)
        try:
            return method, msgspec.convert(request.params, method.params)
        except msgspec.ValidationError as fault:
            # "Expected `int`, got `str` - at `$.priority`"
            text, _, path = str(fault).partition(" - at `$.")
            raise BridgeError(
                "invalid_option",
                f"`{request.method}`: {text}" + (f" for `{path}." if path else "."),
                {"option": path.rstrip("`") or None},
            ) from fault

    async def _hello(self, _call: Call, params: HelloParams) -> dict[str, Any]:
        if params.protocol != PROTOCOL_VERSION:
            raise BridgeError(
                "protocol",
                f"Elixir speaks protocol {params.protocol}, Python {PROTOCOL_VERSION}: the two "
                "halves of the library are of different versions.",
                {"protocol": PROTOCOL_VERSION, "bridge": __version__},
            )
        self._greeted = True
        self._connection.max_frame = params.max_frame
        return {
            "protocol": PROTOCOL_VERSION,
            "bridge": __version__,
            "pid": os.getpid(),
            "python": platform.python_version(),
            "packages": installed_packages(),
            "methods": list(self._methods),
        }
