"""How much memory an engine takes on each of its devices, whether it fits, and what would make it
fit. Nothing is loaded, and vLLM is not imported.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.engine.finding import errors
from vllm_bridge.engine.plan import Plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.memory import GIB, gib
from vllm_bridge.sizing import activations, adapters, formats, kv_cache, layers, settings, weights
from vllm_bridge.sizing.devices import Device
from vllm_bridge.sizing.formats import InFormat
from vllm_bridge.sizing.kv_cache import KVCache
from vllm_bridge.sizing.weights import Weights

# vLLM's default of `gpu_memory_utilization`.
UTILIZATION: Final = 0.92

# What is tried of it where a model does not fit.
_HIGH_UTILIZATION: Final = 0.95

# Up to so many devices are tried.
_MOST_DEVICES: Final = 16

_TENSOR: Final = "tensor_parallel_size"
_PIPELINE: Final = "pipeline_parallel_size"
_DATA: Final = "data_parallel_size"
# Times each other, the devices that an engine takes.
RANKS: Final = (_TENSOR, _PIPELINE, _DATA)
_MOST_RANKS: Final = 10_000

# The options that are counted with.
_NUMBERS: Final = (
    *("max_model_len", "max_num_batched_tokens", "max_num_seqs", "block_size", "cpu_offload_gb"),
    *("max_loras", "max_lora_rank", "kv_cache_memory_bytes", "gpu_memory_utilization"),
    *RANKS,
)

# An exbibyte.
_MOST_BYTES: Final = 2**60

_EIGHT_BITS: Final = ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc")


class Remedy(NamedTuple):
    """A change by which alone a model fits.

    Args:
        text: in words
        options: the engine options that it is; empty for another model or machine
        format: the format to have the model in, where it is that
        devices: how many there must be, where it is that
    """

    text: str
    options: Mapping[str, Any] = {}
    format: str | None = None
    devices: int | None = None


@dataclasses.dataclass(frozen=True)
class _Cache:
    """The KV cache of a model and of its draft, if there is one.

    Args:
        caches: of one rank each
    """

    caches: tuple[KVCache, ...]

    def bytes(self, tokens: int, sequences: int = 1) -> int:
        return sum(cache.bytes(tokens, sequences) for cache in self.caches)

    def concurrency(self, memory: int, tokens: int) -> float:
        """How many requests of ``tokens`` tokens fit; infinite where nothing is kept of them."""
        if len(self.caches) == 1:
            return max(self.caches[0].concurrency(max(memory, 0), tokens), 0.0)
        each = self.bytes(tokens, 2) - self.bytes(tokens)
        return max(memory, 0) / each if each else math.inf

    def longest(self, memory: int, limit: int, sequences: int) -> int:
        """The longest that ``sequences`` requests can be; 0 if there is no room for any."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.bytes(middle, sequences) <= memory:
                low = middle
            else:
                high = middle - 1
        return low


class _Rank(NamedTuple):
    """What one device holds, in bytes.

    Args:
        budget: what the engine may take of it
        weights: of the model, without what is offloaded
        others: adapters, the draft, activations and the framework, by these names
    """

    device: Device
    budget: int
    weights: int
    others: Mapping[str, int]

    @property
    def left(self) -> int:
        """For the KV cache; negative where not even the rest fits."""
        return self.budget - self.weights - sum(self.others.values())


@dataclasses.dataclass(frozen=True)
class _Setup:
    """A model, options and devices that go together.

    Args:
        options: by vLLM's names, with the parallel sizes that the devices make
    """

    checkpoint: Checkpoint
    draft: Checkpoint | None
    options: Mapping[str, Any]
    devices: tuple[Device, ...]
    concurrency: int

    @property
    def kind(self) -> str:
        return self.devices[0].kind

    @functools.cached_property
    def length(self) -> int:
        return kv_cache.max_length(self.checkpoint.config, self.options)

    @functools.cached_property
    def weights(self) -> Weights:
        return weights.on_device(self.checkpoint, self.options, self.kind)

    @functools.cached_property
    def cache(self) -> _Cache:
        models = [self.checkpoint.config] + ([] if self.draft is None else [self.draft.config])
        return _Cache(tuple(kv_cache.of(config, self.options, self.kind) for config in models))

    @functools.cached_property
    def ranks(self) -> list[_Rank]:
        of_model = self.weights
        of_draft = None
        if self.draft is not None:
            options = {**self.options, "quantization": None}
            of_draft = weights.on_device(self.draft, options, self.kind)
        overheads = activations.of(self.checkpoint.config, self.options, self.kind)
        offloaded = int(float(self.options.get("cpu_offload_gb") or 0) * GIB)
        count, replicas = len(of_model.per_rank), settings.count(self.options, _DATA)
        # Ranks on one processor share its memory.
        shares = count * replicas if len(self.devices) == 1 else 1
        found = []
        for index, size in enumerate(of_model.per_rank * replicas):
            device = self.devices[index % len(self.devices)]
            found.append(
                _Rank(
                    device,
                    int(device.memory * utilization(self.options, device) / shares),
                    max(0, size - offloaded),
                    {
                        "adapters": adapters.bytes_per_rank(self.checkpoint.config, self.options),
                        "draft": of_draft.per_rank[index % count] if of_draft else 0,
                        "activations": overheads.activations,
                        "framework": overheads.framework,
                    },
                )
            )
        return found

    @functools.cached_property
    def left(self) -> int:
        """For the KV cache of each rank: what the fullest has, or what was asked for."""
        left = min(rank.left for rank in self.ranks)
        asked = self.options.get("kv_cache_memory_bytes")
        return min(left, asked) if isinstance(asked, int) else left

    def fits(self) -> bool:
        return self.left >= self.cache.bytes(self.length, self.concurrency) and not (
            self._is_too_large_at_first()
        )

    def _is_too_large_at_first(self) -> bool:
        """Whether a model that is quantized once it is loaded does not even get there."""
        found = self.weights
        if found.peak <= found.memory:
            return False
        more = found.peak / found.memory
        return any(rank.weights * more > rank.device.memory for rank in self.ranks)

    def longest(self) -> int:
        """The longest context for which the requests fit, up to the model's own."""
        limit = kv_cache.max_length(self.checkpoint.config, {})
        return self.cache.longest(self.left, limit, self.concurrency)

    def changed(self, **changes: Any) -> "_Setup":
        return dataclasses.replace(self, options={**self.options, **changes})


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
    options, used = _placed(plan.checkpoint, plan.options, tuple(devices))
    setup = _Setup(
        plan.checkpoint, _draft(options), options, used, (wishes or {}).get("concurrency") or 1
    )
    cache, ranks, left, length = setup.cache, setup.ranks, setup.left, setup.length
    needed = cache.bytes(length, setup.concurrency)
    found = setup.weights
    _check_possible(needed, found.peak, *(sum(rank.others.values()) for rank in ranks))
    fits = setup.fits()
    concurrency = cache.concurrency(left, length)
    others = _formats(setup)
    return {
        "model": plan.model,
        "method": plan.method,
        "dtype": plan.dtype,
        "fits": fits,
        "max_model_len": length,
        "concurrency": setup.concurrency,
        "tensor_parallel_size": settings.count(options, _TENSOR),
        "pipeline_parallel_size": settings.count(options, _PIPELINE),
        "data_parallel_size": settings.count(options, _DATA),
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
        "longest_context": setup.longest(),
        "max_concurrency": None if math.isinf(concurrency) else int(concurrency),
        # Models without a cache write no tokens.
        "tokens_per_second": None if math.isinf(concurrency) else _speed(found, options, used),
        "remedies": [] if fits else [one._asdict() for one in _remedies(setup, others)],
        "formats": [{**one._asdict(), "fits": would_fit} for one, would_fit in others],
    }


def utilization(options: Mapping[str, Any], device: Device) -> float:
    """How much of a device an engine may take. Of a processor's memory, which is what others have
    left, all."""
    asked = options.get("gpu_memory_utilization")
    if isinstance(asked, int | float) and 0 < asked <= 1:
        return float(asked)
    return 1.0 if device.kind == "cpu" else UTILIZATION


def _check_known(plan: Plan) -> None:
    is_known = bool(plan.checkpoint.tensors and plan.checkpoint.config)
    for finding in errors(plan.findings):
        # What else keeps an engine from starting, ``check`` tells.
        if not is_known or finding.reason == "invalid_option":
            raise finding.error()
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


def _draft(options: Mapping[str, Any]) -> Checkpoint | None:
    """The model that proposes tokens, where it is one of its own."""
    speculative = options.get("speculative_config")
    if not isinstance(speculative, dict) or str(speculative.get("method")).endswith("mtp"):
        return None
    model = speculative.get("model")
    if not isinstance(model, str):
        return None
    shared = {name: options[name] for name in ("hf_token", "download_dir") if name in options}
    if (revision := speculative.get("revision")) is not None:
        shared["revision"] = revision
    return check_model(model, shared)


def _placed(
    checkpoint: Checkpoint, options: Mapping[str, Any], devices: tuple[Device, ...]
) -> tuple[Mapping[str, Any], tuple[Device, ...]]:
    """The options with their parallel sizes, and a device for each rank."""
    sizes = [name for name in RANKS if options.get(name) is not None]
    if len(devices) > 1 and not sizes:
        return _over(checkpoint, options, len(devices)), devices
    ranks = math.prod(settings.count(options, name) for name in RANKS)
    if len(devices) == 1 and devices[0].kind != "cpu":
        devices *= ranks
    if len(devices) == 1:
        return options, devices
    if ranks > len(devices):
        raise BridgeError(
            "invalid_option",
            f"{' times '.join(f'`{name}`' for name in sizes)} takes {ranks} devices, and "
            f"{len(devices)} are given.",
            {"option": "devices", "value": [device.name for device in devices]},
            remedy="Give as many devices, or smaller sizes.",
        )
    return options, devices[:ranks]


def _over(checkpoint: Checkpoint, options: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """The options for a model over so many devices."""
    divides = layers.query_heads(layers.text_config(checkpoint.config)) % count == 0
    return {**options, _TENSOR if divides else _PIPELINE: count}


def _device(rank: _Rank, needed: int, left: int) -> dict[str, Any]:
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


def _speed(found: Weights, options: Mapping[str, Any], devices: Sequence[Device]) -> float | None:
    """The tokens per second of one sequence that the memory's bandwidth allows at most: all weights
    that a token needs are read for each, stage after stage."""
    ranks = settings.count(options, _TENSOR)
    seconds = 0.0
    for first in range(0, len(found.read), ranks):
        times = []
        for rank in range(first, first + ranks):
            bandwidth = devices[rank % len(devices)].bandwidth
            if bandwidth is None:
                return None
            times.append(found.read[rank] / bandwidth)
        # Ranks on one processor share its bandwidth.
        seconds += sum(times) if len(devices) == 1 else max(times)
    return round(1 / seconds, 1) if seconds else None


def _formats(setup: _Setup) -> list[tuple[InFormat, bool]]:
    """What a plain model would take in each format, and whether it would fit."""
    found = formats.in_formats(setup.checkpoint)
    if not found:
        return []
    plain = setup.changed(quantization=None)
    needed = plain.cache.bytes(plain.length, plain.concurrency)
    weight = weights.weights(setup.checkpoint, {}).memory
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


def _remedies(setup: _Setup, smaller: Sequence[tuple[InFormat, bool]]) -> list[Remedy]:
    """What would make it fit, each by itself; or more devices with a shorter context, if nothing
    is enough.

    Args:
        smaller: what ``_formats`` found
    """
    return list(_single(setup, smaller)) or list(_devices_and_context(setup))


def _single(setup: _Setup, smaller: Sequence[tuple[InFormat, bool]]) -> Iterator[Remedy]:
    for text, options in _options(setup):
        if setup.changed(**options).fits():
            yield Remedy(text, options)
    if (longest := setup.longest()) and setup.changed(max_model_len=longest).fits():
        yield Remedy(f"A context of {longest} tokens at most.", {"max_model_len": longest})
    fewer = setup.cache.concurrency(setup.left, setup.length)
    if 1 <= fewer < setup.concurrency:
        yield Remedy(f"{int(fewer)} requests of this length at a time, not {setup.concurrency}.")
    for one, would_fit in smaller:
        if one.method is not None and would_fit:
            yield Remedy(
                f"The model as {one.name}, whose weights take {gib(one.memory)}.",
                format=one.name,
            )
            break  # the others are smaller
    for larger in _larger(setup):
        if larger.fits():
            count = len(larger.devices)
            options = {_TENSOR: larger.options[_TENSOR]}
            yield Remedy(f"{count} devices like this one.", options, devices=count)
            break


def _devices_and_context(setup: _Setup) -> Iterator[Remedy]:
    for larger in _larger(setup):
        longest = larger.longest()
        if longest and larger.changed(max_model_len=longest).fits():
            count = len(larger.devices)
            yield Remedy(
                f"{count} devices like this one, and a context of {longest} tokens at most.",
                {_TENSOR: larger.options[_TENSOR], "max_model_len": longest},
                devices=count,
            )
            break


def _options(setup: _Setup) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if setup.options.get("kv_cache_dtype") not in _EIGHT_BITS:
        yield "A KV cache of 8 bits.", {"kv_cache_dtype": "fp8"}
    if setup.kind == "cpu":
        return
    if not setup.options.get("enforce_eager"):
        yield "No CUDA graphs, which is slower.", {"enforce_eager": True}
    if max(utilization(setup.options, device) for device in setup.devices) < _HIGH_UTILIZATION:
        yield (
            f"{_HIGH_UTILIZATION:.0%} of the memory, where nothing else runs on it.",
            {"gpu_memory_utilization": _HIGH_UTILIZATION},
        )
    lacking = setup.cache.bytes(setup.length, setup.concurrency) - setup.left
    # With most of them there, nobody would want to wait for an answer.
    most = min(rank.weights for rank in setup.ranks) / 2
    if not setup.options.get("cpu_offload_gb") and 0 < lacking < most:
        size = math.ceil(lacking / GIB)
        yield (
            f"{size} GiB of weights of each device in the memory of the machine, which is slow.",
            {"cpu_offload_gb": size},
        )


def _larger(setup: _Setup) -> Iterator[_Setup]:
    """The same on more of the same devices, of which each has a smaller part."""
    first, ranks = setup.devices[0], settings.count(setup.options, _TENSOR)
    if first.kind == "cpu" or any(device != first for device in setup.devices):
        return
    heads = layers.query_heads(layers.text_config(setup.checkpoint.config))
    others = len(setup.devices) // ranks
    while (ranks := 2 * ranks) * others <= _MOST_DEVICES:
        if heads % ranks == 0:
            devices = (first,) * (ranks * others)
            yield dataclasses.replace(setup.changed(**{_TENSOR: ranks}), devices=devices)
