"""What the owner of an engine asks of it: figures, caches, sleep, health."""

from typing import Annotated, Any, Literal

import msgspec

from vllm_bridge.errors import BridgeError
from vllm_bridge.rpc.table import NoParams


class SleepParams(msgspec.Struct, forbid_unknown_fields=True):
    level: Annotated[int, msgspec.Meta(ge=1, le=2)] = 1


class WakeUpParams(msgspec.Struct, forbid_unknown_fields=True):
    tags: list[Literal["weights", "kv_cache"]] | None = None


async def reset_prefix_cache(llm: Any, _params: NoParams) -> None:
    if not await llm.reset_prefix_cache():
        raise BridgeError(
            "unsupported",
            "The prefix cache is in use: requests are running. Try again when they are done.",
        )


async def reset_mm_cache(llm: Any, _params: NoParams) -> None:
    await llm.reset_mm_cache()


async def reset_encoder_cache(llm: Any, _params: NoParams) -> None:
    await llm.reset_encoder_cache()


async def sleep(llm: Any, params: SleepParams) -> None:
    _check_sleep(llm)
    await llm.sleep(params.level)


async def wake_up(llm: Any, params: WakeUpParams) -> None:
    _check_sleep(llm)
    await llm.wake_up(params.tags)


def _check_sleep(llm: Any) -> None:
    from vllm.platforms import current_platform

    # vLLM takes the calls where they do nothing.
    if not current_platform.is_sleep_mode_available():
        raise BridgeError(
            "unsupported",
            f"Engines on {current_platform.device_type} cannot sleep; stop it instead.",
        )
    if not llm.model_config.enable_sleep_mode:
        raise BridgeError(
            "unsupported",
            "To sleep, an engine must be started with `enable_sleep_mode: true`.",
            {"option": "enable_sleep_mode"},
        )


async def health(llm: Any, _params: NoParams) -> None:
    await llm.check_health()


async def metrics(_llm: Any, _params: NoParams) -> dict[str, Any]:
    """vLLM's Prometheus figures by name, without the prefix; those of several labels as their
    sum. Histograms have their count and their sum."""
    from vllm.v1.metrics.reader import Counter, Gauge, Histogram, get_metrics_snapshot

    figures: dict[str, Any] = {}
    for metric in get_metrics_snapshot():
        name = metric.name.removeprefix("vllm:")
        if isinstance(metric, Counter | Gauge):
            figures[name] = figures.get(name, 0) + metric.value
        elif isinstance(metric, Histogram):
            histogram = figures.setdefault(name, {"count": 0, "sum": 0.0})
            histogram["count"] += metric.count
            histogram["sum"] += metric.sum
    return figures


async def metric_families(_llm: Any, _params: NoParams) -> list[dict[str, Any]]:
    """vLLM's Prometheus metrics with their labels, and those of this process, as they are."""
    from prometheus_client import REGISTRY

    return [
        {
            # In the text format the name of a counter is that of its samples.
            "name": f"{family.name}_total" if family.type == "counter" else family.name,
            "type": family.type,
            "help": family.documentation,
            "samples": [
                [sample.name, sample.labels, sample.value]
                for sample in family.samples
                # When a series began, which the text format has no place for.
                if not sample.name.endswith("_created")
            ],
        }
        for family in REGISTRY.collect()
        if family.name.startswith(("vllm:", "process_"))
    ]


# Each is given the ``AsyncLLM``.
METHODS = {
    "reset_prefix_cache": (NoParams, reset_prefix_cache),
    "reset_mm_cache": (NoParams, reset_mm_cache),
    "reset_encoder_cache": (NoParams, reset_encoder_cache),
    "sleep": (SleepParams, sleep),
    "wake_up": (WakeUpParams, wake_up),
    "health": (NoParams, health),
    "metrics": (NoParams, metrics),
    "metric_families": (NoParams, metric_families),
}
