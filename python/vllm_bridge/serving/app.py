"""vLLM's own API app, on the engine that this worker serves.

The app thinks that it has an engine of its own. What it is given stands before the real one and
notes, for the request that is served, which requests it becomes in vLLM (for ``queue_timeout``) and
whether they were cut off: the app would make an answer of that, and Elixir has to know that the
engine is dead.
"""

import asyncio
import contextlib
import functools
import gc
import logging
from argparse import Namespace
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm_bridge import finish
from vllm_bridge.errors import BridgeError
from vllm_bridge.queueing import Submit
from vllm_bridge.serving.exchange import App, Exchange, Settings


@dataclass
class Asked:
    """A request that is being served.

    Attributes:
        model: what the client calls the model, or the adapter
        lora: vLLM's ``LoRARequest`` of that adapter
        submit: told of each name that vLLM is given
        fault: what ended the engine meanwhile
        cut_off: what vLLM had made of what it cut off
    """

    model: str
    lora: Any
    submit: Submit
    fault: Exception | None = None
    cut_off: Any = None


# Tasks that the app starts for a request have what its own has here.
_asked: ContextVar[Asked] = ContextVar("asked")


class Engine:
    """vLLM's ``AsyncLLM``, as the app gets it."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    # By vLLM's names, which the app uses for some.
    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        return self._watched(self._llm.generate, prompt, sampling_params, request_id, **options)

    def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        return self._watched(self._llm.encode, prompt, pooling_params, request_id, **options)

    async def _watched(
        self, ask: Any, prompt: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        asked = _asked.get()
        asked.submit(request_id)
        stream = ask(prompt, params, request_id, **options)
        try:
            async for output in stream:
                if finish.early(output) is finish.Meaning.CUT_OFF:
                    asked.cut_off = output
                yield output
        except EngineDeadError as error:
            asked.fault = error
            raise
        finally:
            await stream.aclose()


class Adapters(Mapping[str, Any]):
    """The adapters that a request may name: that which it is for."""

    def __getitem__(self, name: str) -> Any:
        asked = _asked.get()
        if asked.lora is None or name != asked.model:
            raise KeyError(name)
        return asked.lora

    def __iter__(self) -> Iterator[str]:
        asked = _asked.get()
        return iter(() if asked.lora is None else (asked.model,))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Apps:
    """The apps of an engine: one for each of the settings that it is asked with, made when it is
    first asked with them.

    Args:
        llm: the ``AsyncLLM``
        tasks: what it can be asked to do
    """

    def __init__(self, llm: Any, tasks: tuple[str, ...]) -> None:
        self._llm = llm
        self._tasks = tasks
        self._made: dict[Settings, Any] = {}
        self._lock = asyncio.Lock()
        self._preparing: set[asyncio.Task[None]] = set()

    def prepare(self, settings: Iterable[Settings]) -> None:
        """Has the apps for these settings made before anybody asks."""
        for each in settings:
            task = asyncio.create_task(self._prepared(each))
            self._preparing.add(task)
            task.add_done_callback(self._preparing.discard)

    async def _prepared(self, settings: Settings) -> None:
        # Whoever asks with them is told what is wrong.
        with contextlib.suppress(Exception):
            await self._app(settings)

    async def serve(
        self, exchange: Exchange, settings: Settings, model: str, lora: Any, submit: Submit
    ) -> tuple[dict[str, Any], Asked]:
        """The answer to one request, and what has become of it in vLLM.

        Args:
            model: what the client calls the model, or the adapter
            lora: vLLM's ``LoRARequest`` of that adapter, which is loaded, if it is one
        """
        app = await self._app(settings)
        asked = Asked(model, lora, submit)
        token = _asked.set(asked)
        try:
            return await exchange.run(_until_death(app, asked)), asked
        finally:
            _asked.reset(token)

    async def _app(self, settings: Settings) -> Any:
        async with self._lock:
            if settings not in self._made:
                self._made[settings] = await _make(self._llm, self._tasks, settings)
                # It stays, as what the engine's start has made; looking for what does not would
                # have others wait.
                gc.freeze()
            return self._made[settings]


def _until_death(app: App, asked: Asked) -> App:
    """The app, which says no more once its engine is dead."""

    async def served(scope: Any, receive: Any, send: Any) -> None:
        async def send_on(message: Any) -> None:
            if asked.fault is None and asked.cut_off is None:
                await send(message)

        await app(scope, receive, send_on)

    return served


async def _make(llm: Any, tasks: tuple[str, ...], settings: Settings) -> Any:
    # It takes a second, in which others are served.
    build_app, init_app_state, arguments = await asyncio.to_thread(_imported)
    from vllm.tool_parsers import ToolParserManager

    parser = settings.tool_call_parser
    if parser is not None and parser not in ToolParserManager.list_registered():
        known = ", ".join(sorted(ToolParserManager.list_registered()))
        raise BridgeError(
            "invalid_option",
            f"vLLM has no parser of tool calls called `{parser}`; it has {known}.",
            {"option": "tool_call_parser"},
        )
    config = llm.model_config
    args = Namespace(
        **arguments
        | {
            "model": config.model,
            "served_model_name": [config.served_model_name],
            "enable_log_requests": False,
            "disable_log_stats": True,
            "structured_outputs_config": llm.vllm_config.structured_outputs_config,
            "enable_fault_tolerance": False,
            "tool_call_parser": parser,
            "enable_auto_tool_choice": parser is not None,
            "chat_template": settings.chat_template,
            "allowed_origins": [],
            # Without one vLLM takes `VLLM_API_KEY`, and the clients' keys stay in Elixir.
            "api_key": [""],
        }
    )
    with _root_logger_kept():
        app = build_app(args, tasks, config)
    await init_app_state(Engine(llm), app.state, args, tasks)
    # vLLM's server would be told to end with its engine; here the worker does.
    app.state.server = SimpleNamespace(should_exit=False)
    models = app.state.openai_serving_models
    # Whose name it is Elixir has found out before it asks, and the app takes no other.
    models.is_base_model = lambda name: name == _asked.get().model
    models.model_name = lambda _lora=None: _asked.get().model
    models.lora_requests = Adapters()
    return app


@functools.cache
def _imported() -> tuple[Any, Any, dict[str, Any]]:
    import dataclasses

    with _root_logger_kept():
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import FrontendArgs

    defaults = FrontendArgs()
    names = (field.name for field in dataclasses.fields(FrontendArgs))
    return build_app, init_app_state, {name: getattr(defaults, name) for name in names}


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """What vLLM's app imports for a host of containers (``model_hosting_container_standards``)
    mutes all logs below ERROR, the worker's own too."""
    root = logging.getLogger()
    level, levels = root.level, {handler: handler.level for handler in root.handlers}
    try:
        yield
    finally:
        root.setLevel(level)
        for handler, before in levels.items():
            handler.setLevel(before)
