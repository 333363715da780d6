"""What a worker with an engine can do: the table of its methods."""

import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from vllm_bridge import admin, lora, tokenizer
from vllm_bridge.beam_search import SearchParams
from vllm_bridge.chat import ChatParams, ChatTemplateParams
from vllm_bridge.engine import Engine, GenerateParams
from vllm_bridge.errors import BridgeError
from vllm_bridge.outputs import add_parsed
from vllm_bridge.pooling import PoolParams, ScoreParams
from vllm_bridge.rpc.call import Call, Limits
from vllm_bridge.rpc.table import Method, NoParams, Table
from vllm_bridge.stream import DeltaStream, Put


class LoadParams(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    options: dict[str, Any] = {}
    devices: list[str] | None = None


class Streamed(Limits, Protocol):
    """The params of a request that may want deltas."""

    sampling_params: dict[str, Any]
    credit: Annotated[int, msgspec.Meta(ge=1)] | None
    parse: bool


L = TypeVar("L", bound=Limits)
S = TypeVar("S", bound=Streamed)


def table(engine: Engine) -> Table:
    """The methods of a worker whose engine ``load`` starts."""

    async def load(call: Call, params: LoadParams) -> dict[str, Any]:
        engine.on_death = call.engine_died
        return await engine.load(params.model, params.options, call.notify, params.devices)

    async def engine_info(_call: Call, _params: NoParams) -> dict[str, Any]:
        return engine.info()

    async def apply_chat_template(_call: Call, params: ChatTemplateParams) -> dict[str, Any]:
        return await engine.apply_chat_template(params)

    def limited(serve: Callable[[str, L], Awaitable[Any]]) -> Callable[[Call, L], Awaitable[Any]]:
        """For methods that take their request's name, whose times are kept here."""

        async def served(call: Call, params: L) -> Any:
            with call.limited(params, functools.partial(engine.waits, call.name)):
                return await serve(call.name, params)

        return served

    def streamed(
        serve: Callable[[str, S, Put | None], Awaitable[dict[str, Any]]],
    ) -> Callable[[Call, S], Awaitable[Any]]:
        """For methods that generate, with deltas if they are asked for."""

        async def served(call: Call, params: S) -> dict[str, Any]:
            deltas = None
            if params.credit is not None:
                deltas = DeltaStream(call.id, params.credit, call.emit)
                call.on_credit = deltas.grant
            waits = functools.partial(engine.waits, call.name)
            with call.limited(params, waits), _as_given(params):
                result = await serve(call.name, params, deltas.put if deltas else None)
            if deltas is not None:
                deltas.finish()
            return add_parsed(result) if params.parse else result

        return served

    methods: dict[str, Method[Any]] = {
        "load": Method(LoadParams, load),
        "engine_info": Method(NoParams, engine_info),
        "generate": Method(GenerateParams, streamed(engine.generate)),
        "beam_search": Method(SearchParams, limited(engine.beam_search)),
        "chat": Method(ChatParams, streamed(engine.chat)),
        "apply_chat_template": Method(ChatTemplateParams, apply_chat_template),
        "pool": Method(PoolParams, limited(engine.pool)),
        "score": Method(ScoreParams, limited(engine.score)),
    }
    for name, (params_type, serve) in (tokenizer.METHODS | admin.METHODS).items():
        methods[name] = Method(params_type, functools.partial(_asked, engine.asked, serve))
    for name, (params_type, serve) in lora.METHODS.items():
        methods[name] = Method(params_type, functools.partial(_asked, engine.lora, serve))
    return Table(methods, engine.progress, engine.exit_summary)


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
            error.message = error.message.replace("`structured_outputs`", f"`{option}`")
        raise


async def _asked(ask: Any, serve: Any, _call: Call, params: Any) -> Any:
    return await ask(serve, params)
