"""What a worker with an engine can do: the table of its methods."""

import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Annotated, Any, Protocol

import msgspec

from vllm_bridge import admin, lora, tokenizer
from vllm_bridge.engine import engine, rank, start
from vllm_bridge.engine.engine import Engine
from vllm_bridge.errors import BridgeError
from vllm_bridge.outputs import add_parsed
from vllm_bridge.rpc.call import Call, Limits
from vllm_bridge.rpc.table import Method, NoParams, Table
from vllm_bridge.serving.exchange import Exchange, HttpParams, PrepareParams, Settings
from vllm_bridge.stream import DeltaStream

# What a ``pong`` tells before there is an engine.
NOT_STARTED = {"steps": 0, "beats": 0, "unfinished": 0}


class LoadParams(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    options: dict[str, Any] = {}
    devices: list[str] | None = None
    http: list[Settings] = []


class Streamed(Limits, Protocol):
    """The params of a request that may want deltas."""

    sampling_params: dict[str, Any]
    credit: Annotated[int, msgspec.Meta(ge=1)] | None
    parse: bool


class Slot:
    """The place for the engine of a worker: empty until ``load`` has started one.

    Args:
        load: see ``engine.start``
    """

    def __init__(self, load: Callable[..., Awaitable[Engine]] = start.load) -> None:
        self.engine: Engine | None = None
        self._load = load
        self._is_taken = False

    @property
    def loaded(self) -> Engine:
        if self.engine is None:
            raise BridgeError("not_running", "No model is loaded in this worker yet.")
        return self.engine

    async def load(self, call: Call, params: LoadParams) -> dict[str, Any]:
        self._take()

        def progress(phase: str, figures: Mapping[str, Any] = {}) -> None:
            call.notify("load_progress", {"phase": phase, **figures})

        self.engine = await self._load(params.model, params.options, progress, params.devices)
        self.engine.on_death(call.engine_died)
        self.engine.prepare_http(params.http)
        return self.engine.info()

    async def rank(self, call: Call, params: LoadParams) -> None:
        self._take()

        def progress(phase: str, figures: Mapping[str, Any] = {}) -> None:
            call.notify("progress", {"id": call.id, "phase": phase, **figures})

        await rank.run(params.model, params.options, progress, params.devices)

    def _take(self) -> None:
        if self._is_taken:
            raise BridgeError("unsupported", "A worker loads one model, once; start another.")
        self._is_taken = True

    def progress(self) -> dict[str, int]:
        return NOT_STARTED if self.engine is None else self.engine.progress()

    def exit_summary(self) -> str:
        return "" if self.engine is None else self.engine.exit_summary()


def table(slot: Slot) -> Table:
    """The methods of a worker whose engine ``load`` starts."""

    async def engine_info(_call: Call, _params: NoParams) -> dict[str, Any]:
        return slot.loaded.info()

    def plain(name: str) -> Callable[[Call, Any], Awaitable[Any]]:
        return lambda _call, params: getattr(slot.loaded, name)(params)

    def limited(name: str) -> Callable[[Call, Any], Awaitable[Any]]:
        async def served(call: Call, params: Limits) -> Any:
            loaded = slot.loaded
            with call.limited(params, functools.partial(loaded.waits, call.name)):
                return await getattr(loaded, name)(call.name, params)

        return served

    def streamed(name: str) -> Callable[[Call, Any], Awaitable[Any]]:
        async def served(call: Call, params: Streamed) -> dict[str, Any]:
            loaded, deltas = slot.loaded, None
            if params.credit is not None:
                deltas = DeltaStream(call.id, params.credit, call.emit, call.pack)
                call.on_credit = deltas.grant
            waits = functools.partial(loaded.waits, call.name)
            with call.limited(params, waits), _as_given(params):
                put = deltas.put if deltas else None
                result = await getattr(loaded, name)(call.name, params, put)
            if deltas is not None:
                deltas.finish()
            return add_parsed(result) if params.parse else result

        return served

    async def http_request(call: Call, params: HttpParams) -> dict[str, Any]:
        loaded, exchange = slot.loaded, Exchange(call.id, params, call.emit)
        call.on_credit = exchange.grant
        with call.limited(params, functools.partial(loaded.waits, call.name)):
            return await loaded.http_request(call.name, params, exchange)

    async def prepare_http(_call: Call, params: PrepareParams) -> None:
        slot.loaded.prepare_http([params.settings])

    def asked(serve: Any) -> Callable[[Call, Any], Awaitable[Any]]:
        return lambda _call, params: slot.loaded.asked(serve, params)

    def of_adapters(serve: Any) -> Callable[[Call, Any], Awaitable[Any]]:
        return lambda _call, params: slot.loaded.lora(serve, params)

    methods: dict[str, Method[Any]] = {
        "load": Method(LoadParams, slot.load),
        "rank": Method(LoadParams, slot.rank),
        "engine_info": Method(NoParams, engine_info),
        "http_request": Method(HttpParams, http_request),
        "prepare_http": Method(PrepareParams, prepare_http),
    }
    for exported, serving in (
        (engine.METHODS, plain),
        (engine.LIMITED, limited),
        (engine.STREAMED, streamed),
    ):
        for name, params_type in exported.items():
            methods[name] = Method(params_type, serving(name))
    for name, (params_type, serve) in (tokenizer.METHODS | admin.METHODS).items():
        methods[name] = Method(params_type, asked(serve))
    for name, (params_type, serve) in lora.METHODS.items():
        methods[name] = Method(params_type, of_adapters(serve))
    return Table(methods, slot.progress, slot.exit_summary)


@contextlib.contextmanager
def _as_given(params: Streamed) -> Iterator[None]:
    """Has an error name the option that the caller gave: structured outputs whose text is to be
    parsed are made of Elixir's ``schema:``, and others may be of the tools of a chat."""
    try:
        yield
    except BridgeError as error:
        if error.details.get("option") == "structured_outputs":
            given = (
                "structured_outputs" if "structured_outputs" in params.sampling_params else "tools"
            )
            error.details["option"] = option = "schema" if params.parse else given
            error.what = error.what.replace("`structured_outputs`", f"`{option}`")
            error.remedy = error.remedy.replace("`structured_outputs`", f"`{option}`")
        raise
