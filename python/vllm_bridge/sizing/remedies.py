"""What would make a model fit: each change is tried with the same arithmetic."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from vllm_bridge.memory import GIB, gib
from vllm_bridge.sizing import layers, settings
from vllm_bridge.sizing.formats import InFormat
from vllm_bridge.sizing.placement import TENSOR, Placement, utilization

# What is tried of `gpu_memory_utilization`.
_HIGH_UTILIZATION: Final = 0.95

# Up to so many devices are tried.
_MOST_DEVICES: Final = 16

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


def remedies(placed: Placement, smaller: Sequence[tuple[InFormat, bool]]) -> list[Remedy]:
    """What would make it fit, each by itself; or more devices with a shorter context, if nothing
    is enough.

    Args:
        smaller: the formats of the model, the largest first, and whether it would fit in each
    """
    return list(_single(placed, smaller)) or list(_devices_and_context(placed))


def _single(placed: Placement, smaller: Sequence[tuple[InFormat, bool]]) -> Iterator[Remedy]:
    for text, options in _options(placed):
        if placed.changed(**options).fits():
            yield Remedy(text, options)
    if (longest := placed.longest()) and placed.changed(max_model_len=longest).fits():
        yield Remedy(f"A context of {longest} tokens at most.", {"max_model_len": longest})
    fewer = placed.cache.concurrency(placed.left, placed.length)
    if 1 <= fewer < placed.concurrency:
        yield Remedy(f"{int(fewer)} requests of this length at a time, not {placed.concurrency}.")
    for one, would_fit in smaller:
        if one.method is not None and would_fit:
            yield Remedy(
                f"The model as {one.name}, whose weights take {gib(one.memory)}.",
                format=one.name,
            )
            break  # the others are smaller
    for larger in _larger(placed):
        if larger.fits():
            count = len(larger.devices)
            options = {TENSOR: larger.options[TENSOR]}
            yield Remedy(f"{count} devices like this one.", options, devices=count)
            break


def _devices_and_context(placed: Placement) -> Iterator[Remedy]:
    for larger in _larger(placed):
        longest = larger.longest()
        if longest and larger.changed(max_model_len=longest).fits():
            count = len(larger.devices)
            yield Remedy(
                f"{count} devices like this one, and a context of {longest} tokens at most.",
                {TENSOR: larger.options[TENSOR], "max_model_len": longest},
                devices=count,
            )
            break


def _options(placed: Placement) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if placed.options.get("kv_cache_dtype") not in _EIGHT_BITS:
        yield "A KV cache of 8 bits.", {"kv_cache_dtype": "fp8"}
    if placed.kind == "cpu":
        return
    if not placed.options.get("enforce_eager"):
        yield "No CUDA graphs, which is slower.", {"enforce_eager": True}
    if max(utilization(placed.options, device) for device in placed.devices) < _HIGH_UTILIZATION:
        yield (
            f"{_HIGH_UTILIZATION:.0%} of the memory, where nothing else runs on it.",
            {"gpu_memory_utilization": _HIGH_UTILIZATION},
        )
    lacking = placed.cache.bytes(placed.length, placed.concurrency) - placed.left
    # With most of them there, nobody would want to wait for an answer.
    most = min(rank.weights for rank in placed.ranks) / 2
    if not placed.options.get("cpu_offload_gb") and 0 < lacking < most:
        size = math.ceil(lacking / GIB)
        yield (
            f"{size} GiB of weights of each device in the memory of the machine, which is slow.",
            {"cpu_offload_gb": size},
        )


def _larger(placed: Placement) -> Iterator[Placement]:
    """The same on more of the same devices, of which each has a smaller part."""
    first, ranks = placed.devices[0], settings.count(placed.options, TENSOR)
    if first.kind == "cpu" or any(device != first for device in placed.devices):
        return
    heads = layers.query_heads(layers.text_config(placed.checkpoint.config))
    others = len(placed.devices) // ranks
    while (ranks := 2 * ranks) * others <= _MOST_DEVICES:
        if heads % ranks == 0:
            devices = (first,) * (ranks * others)
            yield dataclasses.replace(placed.changed(**{TENSOR: ranks}), devices=devices)
