"""What is looked at before an engine starts: what vLLM accepts and gets wrong, and what it refuses
late. Imports vLLM.
"""

import contextlib
import logging
import re
from collections.abc import Mapping
from typing import Any

from vllm_bridge import diagnosis
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import availability, kv_cache, layers, registry

logger = logging.getLogger(__name__)

# The layer that is looked at: one that vLLM does not merge with others, and whose sizes a config
# tells. Experts, and models without it, have others.
_LAYER = re.compile(r".*\blayers\.\d+\.mlp\.down_proj")

# The gates of a layer's experts: what comes before, and their own name.
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|w1)\..*")

# What they are called where a checkpoint is not there to tell.
_EXPERTS = ("model.layers.0.mlp.experts", "gate_proj")

# The names of gate, down and up that go with the gate's.
_EXPERT_PARTS = {"gate_proj": ("gate_proj", "down_proj", "up_proj"), "w1": ("w1", "w2", "w3")}

# The parameters of it that have a shape of their own making.
_WEIGHTS = ("weight", "qweight", "weight_packed", "scales")


def engine_config(
    model: str,
    checkpoint: Checkpoint,
    arguments: dict[str, Any],
    unknown_kv_cache_dtype: str | None = None,
) -> tuple[Any, str | None]:
    """The config of an engine that can run as it is asked to, as far as can be known without
    weights, and the name of the kernel that computes its quantized layers.

    Args:
        unknown_kv_cache_dtype: what ``kv_cache.take_dtype`` returned

    Raises:
        BridgeError: with the reason why it cannot
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    with availability.refusals(checkpoint, arguments.get("quantization")):
        config = AsyncEngineArgs(model=model, **arguments).create_engine_config()
        kv_cache.check(config, arguments.get("kv_cache_dtype"), unknown_kv_cache_dtype)
        return config, _check_layers(config, checkpoint)


def _check_layers(config: Any, checkpoint: Checkpoint) -> str | None:
    """Looks at one linear layer of the model as vLLM would make it.

    Args:
        config: vLLM's config of the engine

    Returns:
        the name of the kernel that computes quantized layers; None for a plain model

    Raises:
        BridgeError: ``unsupported_quantization``, or ``invalid_checkpoint`` where the config
            describes other weights than there are
    """
    model, quant_config = config.model_config, config.quant_config
    if quant_config is not None and model.is_moe:
        _check_experts(config, checkpoint)
    name, columns, rows = _layer(config, checkpoint)
    try:
        with layers.linear(config, model.dtype, quant_config, name, columns, rows) as layer:
            quantized = layers.is_quantized(layer)
            method = registry.of(model.quantization)
            if quantized:
                method.check_layer(config, layer)
            if method.has_final_shapes and (quantized or quant_config is None):
                _check_shapes(config, checkpoint, name, layers.shapes(layer))
            kernel = layers.kernel(layer) if quantized else None
        if quant_config is not None and checkpoint.quantization is None and not quantized:
            _check_effect(config)
        if quantized:
            # Of a size of its own, because an operation that is missing is missing for all.
            with layers.linear(config, model.dtype, quant_config, name) as layer:
                missing = layers.missing_operation(layer)
            if missing is not None:
                raise availability.refused_for(checkpoint, model.quantization, missing)
    except BridgeError:
        raise
    except Exception as error:
        # A plain model may be without linear layers of this kind.
        if quant_config is not None and _is_refusal(error):
            raise availability.refused_for(checkpoint, model.quantization, str(error)) from error
        logger.info("the layers could not be looked at before loading: %r", error)
        return None
    return kernel


def _check_experts(config: Any, checkpoint: Checkpoint) -> None:
    """Refuses quantized experts that cannot be computed on this CPU. On other devices that is left
    to vLLM's start."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    method = config.model_config.quantization
    online = checkpoint.quantization is None
    try:
        with _experts(config, checkpoint):
            pass
        reason = registry.of(method).no_online_experts
        if reason is None or not online:
            return
    except Exception as error:
        if not _is_refusal(error):
            logger.info("the experts could not be looked at before loading: %r", error)
            return
        reason = str(error) or type(error).__name__
    raise BridgeError(
        "unsupported_quantization",
        f"The experts of this mixture cannot be computed with {method} on this CPU: "
        f"{diagnosis.sentence(diagnosis.readable(reason))}",
        {"quantization": method, "exception": reason},
        remedy=_instead(config, online),
    )


def _instead(config: Any, online: bool) -> str:
    if config.lora_config is not None:
        return "Leave out `enable_lora`: vLLM has no kernel for adapters over experts on CPUs."
    others = [
        f'`dtype: "{dtype}"`, which quantizes its other layers, '
        for dtype, method in registry.online_dtypes().items()
        if online and method.no_online_experts is None
    ]
    formats = [method.experts for method in registry.every() if method.experts is not None]
    return (
        f"Use the plain model, {''.join(others)}or a variant of it in one of {', '.join(formats)}; "
        "those are dequantized while they are loaded."
    )


def _experts(config: Any, checkpoint: Checkpoint) -> contextlib.AbstractContextManager[Any]:
    gates = filter(None, map(_EXPERT.fullmatch, checkpoint.tensors))
    prefix, gate = next(((gate[1], gate[2]) for gate in gates), _EXPERTS)
    return layers.experts(config, config.quant_config, prefix, _EXPERT_PARTS[gate])


def _is_refusal(error: Exception) -> bool:
    """Whether this is vLLM's word against a quantization, and not a fault of the look at it, which
    must not keep a model from loading."""
    from vllm.platforms import current_platform

    if isinstance(error, ValueError | ImportError):
        return True
    # On accelerators the layer has no memory, which some of what makes layers does not bear.
    return current_platform.is_cpu() and isinstance(error, RuntimeError | AssertionError)


def _layer(config: Any, checkpoint: Checkpoint) -> tuple[str, int, int]:
    """The name of the layer to look at, its input and its output size."""
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors}
    hf_config = config.model_config.hf_text_config
    columns, rows = (
        getattr(hf_config, f"{name}_size", None) for name in ("intermediate", "hidden")
    )
    for module in sorted(modules):
        if _LAYER.fullmatch(module) and isinstance(columns, int) and isinstance(rows, int):
            return module, columns, rows
    return "model.layers.0.mlp.down_proj", layers.SIZE, layers.SIZE


def _check_effect(config: Any) -> None:
    """For a plain model whose layer was left as it is: whether that is so with all of them."""
    model = config.model_config
    # There are methods for experts only, and users who choose the layers.
    if model.is_moe or getattr(model.quantization_config, "targets", None):
        return
    with layers.linear(config, model.dtype, config.quant_config, "another") as layer:
        if layers.is_quantized(layer):
            return
    raise BridgeError(
        "unsupported_quantization",
        f'`quantization: "{model.quantization}"` has no effect on this model: vLLM quantizes '
        "only layers of experts with it, and this model has none.",
        {"option": "quantization", "quantization": model.quantization},
        remedy=availability.advice_online() or "Leave it out.",
    )


def _check_shapes(
    config: Any, checkpoint: Checkpoint, module: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for parameter in _WEIGHTS:
        tensor = checkpoint.tensors.get(f"{module}.{parameter}")
        expected = shapes.get(parameter)
        if tensor is None or expected is None or tensor.shape == expected:
            continue
        described = "" if checkpoint.quantization is None else f" ({checkpoint.description})"
        raise BridgeError(
            "invalid_checkpoint",
            f"The model's config does not describe its weights{described}: `{module}.{parameter}` "
            f"has the shape {list(tensor.shape)}, and should have {list(expected)}.",
            {"tensor": f"{module}.{parameter}", "shape": tensor.shape, "expected": expected},
            remedy="Download both again, from the same place.",
        )
