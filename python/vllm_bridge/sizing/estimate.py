"""How much memory an engine takes on each of its devices, whether it fits, and what would make it
fit. Nothing is loaded, and vLLM is not imported.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm_bridge.engine.finding import errors
from vllm_bridge.engine.plan import Plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.sizing import formats, settings, weights
from vllm_bridge.sizing.devices import Device
from vllm_bridge.sizing.formats import InFormat
from vllm_bridge.sizing.placement import DATA, PIPELINE, RANKS, TENSOR, Placement, Rank
from vllm_bridge.sizing.remedies import remedies

_MOST_RANKS: Final = 10_000

# The options that are counted with.
_NUMBERS: Final = (
    *("max_model_len", "max_num_batched_tokens", "max_num_seqs", "block_size", "cpu_offload_gb"),
    *("max_loras", "max_lora_rank", "kv_cache_memory_bytes", "gpu_memory_utilization"),
    *RANKS,
)

# An exbibyte.
_MOST_BYTES: Final = 2**60


def estimate(
    plan: Plan, devices: Sequence[Device], wishes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What an engine would take, as a wire map; guides/protocol.md has its fields.

    Args:
        plan: of the model and the options
        devices: that it is to run on. Of a single one there are as many as the options ask for;
            several are used all, by tensor parallelism if the options do not say otherwise and it
            divides the model's heads, else by pipeline parallelism
        wishes: ``concurrency``, how many requests of ``max_model_len`` tokens are to fit at a time;
            1 if it is not given

    Raises:
        BridgeError: why nothing is known of the model's weights, or ``invalid_option``, also where
            there are fewer devices than ranks
    """
    _check_known(plan)
    _check_numbers(plan.options)
    wished = (wishes or {}).get("concurrency") or 1
    placed = Placement.of(plan.checkpoint, plan.options, tuple(devices), wished)
    options = placed.options
    cache, ranks, left, length = placed.cache, placed.ranks, placed.left, placed.length
    needed = cache.bytes(length, placed.concurrency)
    found = placed.weights
    _check_possible(needed, found.peak, *(sum(rank.others.values()) for rank in ranks))
    fits = placed.fits()
    concurrency = cache.concurrency(left, length)
    others = _formats(placed)
    return {
        "model": plan.model,
        "method": plan.method,
        "dtype": plan.dtype,
        "fits": fits,
        "max_model_len": length,
        "concurrency": placed.concurrency,
        "tensor_parallel_size": settings.count(options, TENSOR),
        "pipeline_parallel_size": settings.count(options, PIPELINE),
        "data_parallel_size": settings.count(options, DATA),
        "weights": {
            "disk": found.disk,
            "memory": found.memory,
            "peak": max(found.peak, found.memory),
            "linear": found.linear,
            "embeddings": found.embeddings,
            "experts": found.experts,
            "others": found.others,
        },
        "kv_cache": {
            "dtype": str(options.get("kv_cache_dtype") or "auto"),
            "bytes_per_token": sum(one.bytes_per_token for one in cache.caches),
            "bytes": needed,
            "available": max(left, 0),
            "tokens": 0 if math.isinf(concurrency) else int(concurrency * length),
            "approximate": any(one.is_approximate for one in cache.caches),
        },
        "devices": [_device(rank, needed, left) for rank in ranks],
        "longest_context": placed.longest(),
        "max_concurrency": None if math.isinf(concurrency) else int(concurrency),
        # Models without a cache write no tokens.
        "tokens_per_second": None if math.isinf(concurrency) else _speed(placed),
        "remedies": [] if fits else [one._asdict() for one in remedies(placed, others)],
        "formats": [{**one._asdict(), "fits": would_fit} for one, would_fit in others],
    }


def _check_known(plan: Plan) -> None:
    is_known = bool(plan.checkpoint.tensors and plan.checkpoint.config)
    for finding in errors(plan.findings):
        # What else keeps an engine from starting, ``check`` tells.
        if not is_known or finding.reason == "invalid_option":
            raise finding.error()
    if plan.isq is not None:
        raise BridgeError(
            "unsupported",
            f"An estimate is of files as they are, and `{plan.isq.option}` makes others of them.",
            {"option": plan.isq.option, "value": plan.isq.name},
            remedy=f"Leave `{plan.isq.option}` out: the estimate of the plain model says what it "
            "would take in other formats.",
        )
    if is_known:
        return
    raise BridgeError(
        "unsupported",
        f"How much memory `{plan.model}` takes cannot be told: its weights are in files whose "
        "headers are not read here, or it has no config.json.",
        {"model": plan.model},
        remedy="Use it in the form of safetensors or GGUF files.",
    )


def _check_numbers(options: Mapping[str, Any]) -> None:
    """Refuses what counts here and is no number. Of other options vLLM says what they may be."""
    for name in _NUMBERS:
        value = options.get(name)
        least, most = (1, _MOST_RANKS) if name in RANKS else (-_MOST_BYTES, _MOST_BYTES)
        if value is None or (isinstance(value, int | float) and least <= value <= most):
            continue
        raise BridgeError(
            "invalid_option",
            f"`{name}` must be a number that an engine can have.",
            {"option": name, "value": value if isinstance(value, str) else repr(value)},
            remedy="Leave it out for vLLM's default.",
        )


def _check_possible(*sizes: int) -> None:
    """Refuses what no machine has, and no message."""
    if max(sizes) > _MOST_BYTES:
        raise BridgeError(
            "out_of_memory",
            "By its config.json and the options the model would take more memory than any machine "
            "has.",
            {"needed_bytes": _MOST_BYTES},
            remedy="Look at `max_model_len`, `concurrency`, and the sizes in the config.json.",
        )


def _device(rank: Rank, needed: int, left: int) -> dict[str, Any]:
    return {
        "name": rank.device.name,
        "kind": rank.device.kind,
        "memory": rank.device.memory,
        "source": rank.device.source,
        "budget": rank.budget,
        "weights": rank.weights,
        **rank.others,
        "kv_cache": needed,
        "left": min(rank.left, left) - needed,
        "fits": min(rank.left, left) >= needed,
    }


def _speed(placed: Placement) -> float | None:
    """The tokens per second of one sequence that the memory's bandwidth allows at most: all weights
    that a token needs are read for each, stage after stage."""
    read, devices = placed.weights.read, placed.devices
    ranks = settings.count(placed.options, TENSOR)
    seconds = 0.0
    for first in range(0, len(read), ranks):
        times = []
        for rank in range(first, first + ranks):
            bandwidth = devices[rank % len(devices)].bandwidth
            if bandwidth is None:
                return None
            times.append(read[rank] / bandwidth)
        # Ranks on one processor share its bandwidth.
        seconds += sum(times) if len(devices) == 1 else max(times)
    return round(1 / seconds, 1) if seconds else None


def _formats(placed: Placement) -> list[tuple[InFormat, bool]]:
    """What a plain model would take in each format, the largest first, and whether it would fit."""
    found = formats.in_formats(placed.checkpoint)
    if not found:
        return []
    plain = placed.changed(quantization=None)
    needed = plain.cache.bytes(plain.length, plain.concurrency)
    weight = weights.weights(placed.checkpoint, {}).memory
    return [
        (
            one,
            all(
                rank.left + rank.weights >= rank.weights * one.memory / weight + needed
                for rank in plain.ranks
            ),
        )
        for one in found
    ]
