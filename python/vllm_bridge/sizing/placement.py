"""A model on its devices: what each of them holds, and what is left for the KV cache."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.memory import GIB
from vllm_bridge.sizing import activations, adapters, kv_cache, layers, settings, weights
from vllm_bridge.sizing.devices import Device
from vllm_bridge.sizing.kv_cache import KVCache
from vllm_bridge.sizing.weights import Weights

TENSOR: Final = "tensor_parallel_size"
PIPELINE: Final = "pipeline_parallel_size"
DATA: Final = "data_parallel_size"
# Times each other, the devices that an engine takes.
RANKS: Final = (TENSOR, PIPELINE, DATA)

# vLLM's default of `gpu_memory_utilization`.
_UTILIZATION: Final = 0.92


@dataclasses.dataclass(frozen=True)
class Caches:
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
        lengths = range(1, limit + 1)
        return bisect.bisect_right(lengths, memory, key=lambda each: self.bytes(each, sequences))


class Rank(NamedTuple):
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
class Placement:
    """A model on devices.

    Args:
        draft: the model that proposes tokens, where it is one of its own
        options: by vLLM's names, with the parallel sizes that the devices make
        devices: one for each rank; a single processor for all of them
        concurrency: how many requests of ``length`` tokens are to fit at a time
    """

    checkpoint: Checkpoint
    draft: Checkpoint | None
    options: Mapping[str, Any]
    devices: tuple[Device, ...]
    concurrency: int

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        options: Mapping[str, Any],
        devices: tuple[Device, ...],
        concurrency: int,
    ) -> "Placement":
        """
        Raises:
            BridgeError: ``invalid_option`` where there are fewer devices than ranks, or why the
                draft could not be looked at
        """
        options, devices = _divided(checkpoint, options, devices)
        return cls(checkpoint, _draft(options), options, devices, concurrency)

    @property
    def kind(self) -> str:
        return self.devices[0].kind

    @functools.cached_property
    def length(self) -> int:
        """Of the longest request."""
        return kv_cache.max_length(self.checkpoint.config, self.options)

    @functools.cached_property
    def weights(self) -> Weights:
        return weights.on_device(self.checkpoint, self.options, self.kind)

    @functools.cached_property
    def cache(self) -> Caches:
        models = [self.checkpoint.config] + ([] if self.draft is None else [self.draft.config])
        return Caches(tuple(kv_cache.of(config, self.options, self.kind) for config in models))

    @functools.cached_property
    def ranks(self) -> list[Rank]:
        of_model = self.weights
        of_draft = None
        if self.draft is not None:
            options = {**self.options, "quantization": None}
            of_draft = weights.on_device(self.draft, options, self.kind)
        overheads = activations.of(self.checkpoint.config, self.options, self.kind)
        offloaded = int(float(self.options.get("cpu_offload_gb") or 0) * GIB)
        count, replicas = len(of_model.per_rank), settings.count(self.options, DATA)
        # Ranks on one processor share its memory.
        shares = count * replicas if len(self.devices) == 1 else 1
        found = []
        for index, size in enumerate(of_model.per_rank * replicas):
            device = self.devices[index % len(self.devices)]
            found.append(
                Rank(
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

    def changed(self, **changes: Any) -> "Placement":
        return dataclasses.replace(self, options={**self.options, **changes})


def utilization(options: Mapping[str, Any], device: Device) -> float:
    """How much of a device an engine may take. Of a processor's memory, which is what others have
    left, all."""
    asked = options.get("gpu_memory_utilization")
    if isinstance(asked, int | float) and 0 < asked <= 1:
        return float(asked)
    return 1.0 if device.kind == "cpu" else _UTILIZATION


def _draft(options: Mapping[str, Any]) -> Checkpoint | None:
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


def _divided(
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
    return {**options, TENSOR if divides else PIPELINE: count}
