"""The start of an engine.

It blocks the event loop for seconds: vLLM reads configs and waits for its processes synchronously,
and they must be children of the main thread (the parent-death signal that ends them with the
worker follows the thread that started them). Nothing is lost by it: a worker that starts has
nothing else to serve, and the guard, which watches the pipe on its own, ends it at any time.
"""

import asyncio
import contextlib
import gc
import logging
import platform
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from vllm_bridge import diagnosis, forking, quantization
from vllm_bridge.chat import Chat
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.digest import digest
from vllm_bridge.engine import facts, isq
from vllm_bridge.engine.check import check
from vllm_bridge.engine.config import Config, offline
from vllm_bridge.engine.engine import Engine, warm_up
from vllm_bridge.engine.plan import Plan
from vllm_bridge.hub import download
from vllm_bridge.hub.repository import Repository
from vllm_bridge.quantization import online
from vllm_bridge.registry import in_place

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Progress(Protocol):
    """Told of each phase that begins, and in one that takes long how far it is: see
    guides/protocol.md, ``load_progress``."""

    def __call__(self, phase: str, figures: Mapping[str, Any] = {}, /) -> None: ...


class Prepared(NamedTuple):
    """An engine that can be started.

    Args:
        plan: what is known of it without vLLM
        config: what it is made of
        source: the model as it was named, before anything was made of it here
        note: what users are told of what was made; None where nothing was
    """

    plan: Plan
    config: Config
    source: Checkpoint
    note: str | None


async def load(
    model: str,
    options: Mapping[str, Any],
    progress: Progress = lambda _phase, _figures={}: None,
    devices: Sequence[str] | None = None,
) -> Engine:
    """Starts an engine, if ``check`` has nothing against it. Imports vLLM.

    Args:
        options: engine options as the user gave them
        progress: told of each phase that begins, and how far a download is
        devices: the only ones that the engine may use

    Raises:
        BridgeError: with the reason why it did not start. The process is of no use then.
    """
    started = time.monotonic()
    prepared = await prepare(model, options, progress, devices)
    plan, config = prepared.plan, prepared.config
    with diagnosis.load_errors(plan.options):
        from vllm.v1.engine.async_llm import AsyncLLM

        with offline(plan):
            is_one_of_several = config.vllm_config.parallel_config.nnodes > 1
            progress("engine", {"checkpoint": digest(prepared.source)} if is_one_of_several else {})
            llm = AsyncLLM.from_vllm_config(
                config.vllm_config,
                enable_log_requests=bool(config.arguments.get("enable_log_requests")),
                disable_log_stats=bool(config.arguments.get("disable_log_stats")),
            )
        tasks = await _while_alive(llm, llm.get_supported_tasks())
        chat = Chat(llm)
        if llm.model_config.runner_type == "generate":
            await warm_up(llm)
            await chat.warm_up()
        _settle()
        made = prepared.note or online.note(plan.online_dtype, config.settings, llm.model_config)
        info = _info(model, config, tasks) | {
            "quantization_note": await _while_alive(
                llm, quantization.note(llm, made, config.kernel)
            ),
            "load_seconds": time.monotonic() - started,
        }
        return Engine(llm, chat, tasks, info, plan)


async def _while_alive(llm: Any, question: Coroutine[Any, Any, T]) -> T:
    """The answer of an engine, which may die instead. vLLM tells that to requests only: whoever
    asked for something else waits on, and a worker that starts is not watched yet."""
    from vllm.v1.engine.exceptions import EngineDeadError

    answer = asyncio.ensure_future(question)
    await asyncio.wait((answer, llm.output_handler), return_when=asyncio.FIRST_COMPLETED)
    if answer.done():
        return await answer
    answer.cancel()
    await asyncio.wait((answer,))
    raise EngineDeadError


def _settle() -> None:
    """Spares every later request what only a start needs."""
    from vllm import envs

    # What is here now stays, and is not to be looked through again while requests wait: each
    # time that would take as long as some hundred of them. vLLM's own server does it, too.
    gc.collect()
    gc.freeze()
    # One variable is asked for with each token, which was 8 % of what this process does. vLLM has
    # its other processes keep them.
    envs.enable_envs_cache()


async def prepare(
    model: str, options: Mapping[str, Any], progress: Progress, devices: Sequence[str] | None
) -> Prepared:
    """Brings the model here and makes of it what the options ask for, if ``check`` has nothing
    against it. Imports vLLM.

    Of a model that is still on the hub, what the hub tells of it is checked before anything large
    is fetched.

    Raises:
        BridgeError: with the reason why it cannot be started
    """
    checked = check(model, options, progress, devices, _import, is_start=True)
    if (repository := checked.plan.checkpoint.repository) is not None:
        checked.refuse()
        await _fetch(repository, options, progress)
        # The same files, whatever happens on the hub meanwhile.
        options = {**options, "revision": repository.commit}
        checked = check(model, options, devices=devices, is_start=True)
        assert checked.plan.checkpoint.repository is None, repository  # noqa: S101 - it is here
    note = None
    source = checked.plan.checkpoint
    if (wish := checked.plan.isq) is not None:
        checked.refuse()
        folder = await _in_thread(lambda told: isq.made(source, wish, told), "quantizing", progress)
        options = isq.options_for(options, source, wish)
        options.setdefault("served_model_name", model)
        checked = check(folder, options, devices=devices)
        note = isq.note(folder, wish)
    config = checked.configured()
    # One that is served by its own name is in use, too.
    in_place.hold(checked.plan.checkpoint.folder or "")
    for finding in checked.findings:
        if finding.severity == "warning":
            logger.warning(finding.text)
    return Prepared(checked.plan, config, source, note)


async def _fetch(repository: Repository, options: Mapping[str, Any], progress: Progress) -> None:
    await _in_thread(
        lambda told: download.pull(repository, options, lambda now: told(now.to_wire())),
        "download",
        progress,
    )


async def _in_thread(
    work: Callable[[Callable[[Mapping[str, Any]], None]], T], phase: str, progress: Progress
) -> T:
    """What takes long, so that the worker hears when it is to end. It is given what tells how far
    it is."""
    loop = asyncio.get_running_loop()
    progress(phase)

    def told(figures: Mapping[str, Any]) -> None:
        loop.call_soon_threadsafe(progress, phase, figures)

    return await asyncio.to_thread(work, told)


def _import() -> None:
    """Imports what vLLM's processes need, and forks them from what there is then."""
    import vllm.v1.engine.async_llm  # noqa: F401

    forking.start()


def _info(model: str, config: Config, tasks: tuple[str, ...]) -> dict[str, Any]:
    from vllm.platforms import current_platform

    cache = config.vllm_config.cache_config
    tokens = cache.kv_cache_size_tokens
    if tokens is None:
        tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    return facts.of_config(config) | {
        "model": model,
        "kv_cache_tokens": tokens,
        "kv_cache_bytes": cache.kv_cache_memory_bytes,
        "device_name": _device_name(current_platform),
        "tasks": sorted(tasks),
    }


def _device_name(current_platform: Any) -> str:
    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        for line in cpuinfo:
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()
