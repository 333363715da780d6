"""The formats that a model has or can have, and the ways to them."""

import math
from collections.abc import Iterator
from typing import Final

from vllm_bridge import elixir
from vllm_bridge.advice.ranking import Candidate, Way
from vllm_bridge.advice.rules import Format, Rules
from vllm_bridge.checkpoints import gguf_config
from vllm_bridge.checkpoints.detect import Detected, format_name
from vllm_bridge.engine.plan import Plan
from vllm_bridge.quantization import registry
from vllm_bridge.quantization.method import Method
from vllm_bridge.sizing import formats, weights
from vllm_bridge.sizing.formats import InFormat
from vllm_bridge.sizing.layers import text_config
from vllm_bridge.sizing.weights import Weights

# What llama.cpp calls models that are called otherwise elsewhere.
_LLAMA_CPP: Final = {"mistral": "llama", "mixtral": "llama", "phi": "phi2", "gemma3_text": "gemma3"}

# The plain format that `weights` counts in.
_HALF: Final = "bfloat16"


def of(plan: Plan, detected: Detected, kind: str, rules: Rules) -> list[Candidate]:
    """Of a plain model all formats that it can have, of a quantized one the format that it is in.

    Args:
        kind: of the device
    """
    own = weights.on_device(plan.checkpoint, plan.options, kind)
    as_is = Way("as_is", plan.model, {}, "load it as it is")
    candidates = [Candidate(format_name(detected), detected.method, own.disk, own.memory, (as_is,))]
    if detected.method is None:
        candidates += _made(plan, kind, own, rules)
    return candidates


def _made(plan: Plan, kind: str, own: Weights, rules: Rules) -> Iterator[Candidate]:
    """The formats that the plain model can be brought into."""
    sizes = {_name(found): found for found in formats.in_formats(plan.checkpoint)}
    # Loaded weights take more than they have, such as a second copy for the kernels of CPUs.
    more = own.memory - sizes[_HALF].memory if _HALF in sizes else 0
    for rule in rules.formats.values():
        method = registry.of(rule.name.partition(" (")[0])
        ways = tuple(_ways(plan.model, rule, method, bool(own.experts)))
        if not ways or not _is_possible(plan, rule, method, bool(own.experts)):
            continue
        found = sizes.get(rule.name)
        if found is None and rule.in_flight is not None:
            made = weights.on_device(
                plan.checkpoint, {**plan.options, "quantization": method.name}, kind
            )
            found = InFormat(method.name, rule.name, own.disk, made.memory - more)
        if found is None:
            continue
        memory = found.memory + (0 if method.name == "gguf" else more)
        speed = rules.speed(rule.name, kind, None)
        if speed is not None and speed.unpacked:
            memory = own.memory
        elif kind == "cpu" and method.name != "gguf":
            memory += _of_experts(own, method, rule)
        yield Candidate(rule.name, method.name, found.disk, memory, ways)


def _name(found: InFormat) -> str:
    return f"gguf ({found.name})" if found.method == "gguf" else found.name


def _ways(model: str, rule: Format, method: Method, has_experts: bool) -> Iterator[Way]:
    if rule.in_flight is not None and not (has_experts and method.no_online_experts):
        text = f"load the plain model with {elixir.options(rule.in_flight)}"
        yield Way("in_flight", model, rule.in_flight, text)
    if rule.made_with:
        text = " and a text of yours" if rule.calibration else ""
        yield Way("make", model, {}, f"make it with {rule.made_with}{text}")


def _is_possible(plan: Plan, rule: Format, method: Method, has_experts: bool) -> bool:
    if has_experts and rule.is_dense:
        return False
    if method.name != "gguf":
        return True
    model_type = str(text_config(plan.checkpoint.config).get("model_type"))
    return _LLAMA_CPP.get(model_type, model_type.replace("_", "")) in gguf_config.architectures()


def _of_experts(own: Weights, method: Method, rule: Format) -> int:
    """What experts take more than they would packed, where they are dequantized."""
    form = next((form for form in method.formats if form.name == rule.name), None)
    each = method.bytes_per_weight(form.config) if form is not None else None
    return 0 if each is None else math.ceil(own.experts * (1 - each.memory / 2))
