"""The start of an engine from its plan.

It blocks the event loop for seconds: vLLM reads configs and waits for its processes synchronously,
and they must be children of the main thread (the parent-death signal that ends them with the
worker follows the thread that started them). Nothing is lost by it: a worker that starts has
nothing else to serve, and the guard, which watches the pipe on its own, ends it at any time.
"""

import contextlib
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_bridge import defaults, diagnosis, forking, quantization
from vllm_bridge.chat import Chat
from vllm_bridge.engine.config import configure, offline
from vllm_bridge.engine.engine import Engine, warm_up
from vllm_bridge.engine.plan import Plan, plan
from vllm_bridge.quantization import online

logger = logging.getLogger(__name__)


async def load(
    model: str,
    options: Mapping[str, Any],
    progress: Callable[[str], None] = lambda _: None,
    devices: Sequence[str] | None = None,
) -> Engine:
    """Plans an engine and starts it; see ``start``."""
    return await start(plan(model, options, progress), progress, devices)


async def start(
    plan: Plan,
    progress: Callable[[str], None] = lambda _: None,
    devices: Sequence[str] | None = None,
) -> Engine:
    """Starts what was planned. Imports vLLM.

    Args:
        progress: told of each phase that begins
        devices: the only ones that the engine may use

    Raises:
        BridgeError: with the reason why it did not start. The process is of no use then.
    """
    started = time.monotonic()
    plan.check()
    for finding in plan.findings:
        logger.warning(f"{finding.message} {finding.remedy}".rstrip())
    with diagnosis.load_errors(plan.options):
        progress("import")
        if devices is not None:
            defaults.use_devices(devices)
        from vllm.v1.engine.async_llm import AsyncLLM

        forking.start()

        progress("config")
        config = configure(plan)
        with offline(plan):
            progress("engine")
            llm = AsyncLLM.from_vllm_config(
                config.vllm_config,
                enable_log_requests=bool(config.arguments.get("enable_log_requests")),
                disable_log_stats=bool(config.arguments.get("disable_log_stats")),
            )
        tasks = await llm.get_supported_tasks()
        chat = Chat(llm)
        if llm.model_config.runner_type == "generate":
            await warm_up(llm)
            await chat.warm_up()
        made = online.note(plan.online_dtype, config.settings, llm.model_config)
        info = _info(plan.model, config.vllm_config, tasks) | {
            "quantization_note": await quantization.note(llm, made, config.kernel),
            "quantization_kernel": config.kernel,
            "load_seconds": time.monotonic() - started,
        }
        return Engine(llm, chat, tasks, info)


def _info(model: str, config: Any, tasks: tuple[str, ...]) -> dict[str, Any]:
    from vllm.platforms import current_platform
    from vllm.version import __version__ as vllm_version

    model_config, cache = config.model_config, config.cache_config
    parallel, scheduler = config.parallel_config, config.scheduler_config
    tokens = cache.kv_cache_size_tokens
    if tokens is None:
        tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    return {
        "model": model,
        "model_type": model_config.hf_config.model_type,
        "architecture": model_config.architecture,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "quantization": model_config.quantization,
        "quantization_config": _quantization_config(model_config.hf_config),
        "kv_cache_dtype": str(cache.cache_dtype),
        "kv_cache_tokens": tokens,
        "kv_cache_bytes": cache.kv_cache_memory_bytes,
        "max_model_len": model_config.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "scheduling_policy": str(scheduler.policy),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "vllm_version": vllm_version,
        "device": current_platform.device_type,
        "device_name": _device_name(current_platform),
        "runner": model_config.runner_type,
        "tasks": sorted(tasks),
    }


def _quantization_config(hf_config: Any) -> dict[str, Any] | None:
    """The quantization config of a loaded model, as plain data."""
    found = getattr(hf_config, "quantization_config", None)
    if found is None:
        return None
    return dict(found if isinstance(found, Mapping) else found.to_dict())


def _device_name(current_platform: Any) -> str:
    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        for line in cpuinfo:
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()
