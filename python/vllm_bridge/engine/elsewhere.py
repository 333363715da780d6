"""What can be told here of an engine on devices of another machine. Imports vLLM, for what its
methods say of themselves, and asks nothing of the devices of this one."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_bridge import memory
from vllm_bridge.checkpoints import detect, families
from vllm_bridge.checkpoints.detect import format_name
from vllm_bridge.engine.finding import Finding
from vllm_bridge.engine.plan import Plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.params import engine_options
from vllm_bridge.quantization import devices, naming
from vllm_bridge.sizing import settings
from vllm_bridge.sizing.devices import Device
from vllm_bridge.sizing.estimate import estimate
from vllm_bridge.sizing.placement import RANKS

# The least that vLLM computes in bfloat16 on. Source: ``supported_dtypes`` in platforms/cuda.py,
# which needs a device.
_BFLOAT16 = (8, 0)

# What would make a model fit has a few ways; the rest is in the estimate.
_MOST_REMEDIES = 3


def check(plan: Plan, machine: Sequence[Device]) -> Iterator[Finding]:
    """What is found out about a plan for these devices.

    Raises:
        BridgeError: ``invalid_option`` for a value that vLLM does not take
    """
    options = engine_options(plan.options)
    ranks = math.prod(settings.count(options, name) for name in RANKS)
    yield from _devices(ranks, machine)
    yield from _known(plan, options)
    yield from _capability(plan, options, machine)
    found = _estimated(plan, ranks, machine)
    if found is not None and not found["fits"]:
        yield _too_large(found)
    told = (
        f"This is said of {_named(machine)} without one: which kernel computes the layers, and how "
        "much its vLLM leaves to the KV cache, only the device itself can tell."
    )
    limit = found["tokens_per_second"] if found else None
    if limit is not None:
        told += (
            f" The bandwidth of its memory allows one request {limit:.1f} tokens/s at most, which "
            "is a limit and no forecast."
        )
    details = {"devices": [device.name for device in machine], "tokens_per_second": limit}
    yield Finding("info", "device", told, details)


def _named(machine: Sequence[Device]) -> str:
    name = machine[0].name
    return name if len(machine) == 1 else f"{len(machine)} devices ({name})"


def _devices(ranks: int, machine: Sequence[Device]) -> Iterator[Finding]:
    """Whether there is a device for each rank. Of a single one that was named there are as many as
    the options ask for, as in ``estimate``."""
    sizes = " times ".join(f"`{name}`" for name in RANKS)
    details = {"option": "tensor_parallel_size", "value": ranks, "devices": len(machine)}
    if 1 < len(machine) < ranks and machine[0].kind != "cpu":
        yield Finding(
            "error",
            "invalid_option",
            f"The engine would have {ranks} ranks ({sizes}), and the machine has {len(machine)} "
            "devices.",
            details,
            "Lower them, or name more devices.",
        )
    elif ranks < len(machine):
        yield Finding(
            "info",
            "device",
            f"The engine would use {ranks} of the {len(machine)} devices.",
            details,
            f"`tensor_parallel_size: {len(machine)}` and `replicas: {len(machine)}` use all of "
            "them.",
        )


def _known(plan: Plan, options: dict[str, Any]) -> Iterator[Finding]:
    """What the installed vLLM knows, whatever the device."""
    own, asked = plan.checkpoint.quant_method, options.get("quantization")
    if own is not None and naming.resolve(own) is None:
        instead = "Use a variant of the model in another format."
        yield Finding.of(naming.unknown_of(plan.checkpoint, instead))
    if asked is not None and naming.resolve(asked) is None:
        yield Finding.of(naming.unknown(asked))
    architecture = plan.checkpoint.architecture
    if architecture is not None and not families.is_known(plan.checkpoint.config):
        yield Finding(
            "warning",
            "unsupported_model",
            f"{architecture} is not in vLLM's registry. It may run all the same, by "
            "the code of transformers or of a plugin.",
            {"architecture": architecture},
            "Check it on the device.",
        )


def _capability(
    plan: Plan, options: dict[str, Any], machine: Sequence[Device]
) -> Iterator[Finding]:
    method = options.get("quantization") or plan.method
    if method is not None:
        is_own = plan.checkpoint.quantization is not None
        form = format_name(detect.of(plan.checkpoint)) if is_own else method
        if refused := devices.refusal(form, method, machine):
            yield Finding(
                "error",
                "unsupported_quantization",
                refused,
                {"quantization": method, "devices": [device.name for device in machine]},
                "Use another device, or a variant of the model in another format.",
            )
    found = min((d.capability for d in machine if d.capability is not None), default=None)
    if found is None or machine[0].kind != "cuda":
        return
    if plan.dtype == "bfloat16" and found < _BFLOAT16:
        asked, has = options.get("dtype") == "bfloat16", devices.dotted(found)
        yield Finding(
            "error" if asked else "info",
            "unsupported" if asked else "device",
            f"{machine[0].name} has compute capability {has}, and does not compute in bfloat16.",
            {"option": "dtype", "value": "bfloat16", "capability": has},
            'Leave `dtype` out, or give `dtype: "float16"`.'
            if asked
            else "vLLM takes float16, whose range is smaller: look at what it answers.",
        )


def _estimated(plan: Plan, ranks: int, machine: Sequence[Device]) -> dict[str, Any] | None:
    """The estimate; None where there is none: what is against it has a finding, or is vLLM's to
    find out."""
    sizes = {"tensor_parallel_size": 1} | dict(plan.options)
    try:
        return estimate(dataclasses.replace(plan, options=sizes), machine[:ranks])
    except BridgeError:
        return None


def _too_large(found: dict[str, Any]) -> Finding:
    ways = [way["text"].rstrip(".") for way in found["remedies"][:_MOST_REMEDIES]]
    remedy = ways and f"Any of these would make it fit: {'; '.join(ways)}."
    fullest = min(found["devices"], key=lambda device: device["memory"] - device["weights"])
    weights, size = fullest["weights"], fullest["memory"]
    details = {"needed_bytes": weights, "available_bytes": size}
    if weights > size:
        return Finding(
            "error",
            "out_of_memory",
            f"The weights of a rank need {memory.gib(weights)}, and {fullest['name']} has "
            f"{memory.gib(size)}.",
            details,
            remedy or "Use a smaller model, or more devices.",
        )
    cache, left = found["kv_cache"]["bytes"], found["kv_cache"]["available"]
    return Finding(
        "warning",
        "out_of_memory",
        f"By estimate it does not fit: beside the weights {memory.gib(left)} of a device are left "
        f"for the KV cache, and a request of {found['max_model_len']} tokens needs "
        f"{memory.gib(cache)}.",
        {"needed_bytes": cache, "available_bytes": left},
        remedy or "Lower `max_model_len`, or use more devices.",
    )
