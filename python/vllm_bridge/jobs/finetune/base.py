"""The model that an adapter is trained over: whether there is a way to, and loading it."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from vllm_bridge import machine
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import registry
from vllm_bridge.quantization.method import Method

if TYPE_CHECKING:
    from vllm_bridge.jobs.finetune.options import Settings

EXTRA: Final = {"peft": "peft", "accelerate": "accelerate"}

# Whose layers `packed` has: how they store integers, by their own words, and of how many bits.
_PACKED: Final = {
    "awq": (("gemm",), (4,)),
    "gptq": (("gptq", "gptq_v2"), (2, 3, 4, 8)),
}

_PLAIN = (
    "Train over the plain model that it was made of; the adapter is then served over this one too, "
    "where vLLM has adapters for it."
)

_ROUNDED = "weights and activations are rounded to 8 bits, and no gradient goes through that"

# Why nothing is trained over them.
_REFUSALS: Final = {
    "gguf": "transformers has no layers for it that gradients go through",
    "compressed-tensors": "its layers are made for serving, and no gradient goes through them",
    "fp8": _ROUNDED,
    "fbgemm_fp8": _ROUNDED,
    "torchao": "its layers are made for serving, and no gradient goes through them",
    "hqq": "transformers 5 has no layers for it",
    "squeezellm": "there are no layers for it that gradients go through",
}


def check_packages(needs_bitsandbytes: bool = False) -> None:
    """Raises ``vllm_not_installed`` where the packages that train are not there."""
    extras = {
        "finetune": EXTRA,
        **({"bitsandbytes": {"": "bitsandbytes"}} if needs_bitsandbytes else {}),
    }
    for extra, modules in extras.items():
        missing = [name for name in modules.values() if not importlib.util.find_spec(name)]
        if missing:
            raise BridgeError(
                "vllm_not_installed",
                f"Fine-tuning needs packages that are not installed ({', '.join(missing)}).",
                {"missing": missing, "extra": extra},
                remedy=f"Run `mix vllm.setup --with {extra}`.",
            )


def check(checkpoint: Checkpoint, quantizes: bool) -> None:
    """Whether an adapter can be trained over a model. Reads no weights.

    Args:
        quantizes: whether ``load_in_4bit`` or ``load_in_8bit`` is asked for

    Raises:
        BridgeError: ``unsupported_quantization`` with the reason, ``unsupported_model``,
            ``vllm_not_installed``, ``invalid_option``
    """
    method = _method(checkpoint)
    check_packages(quantizes or (method is not None and method.name == "bitsandbytes"))
    if method is None:
        architecture = checkpoint.architecture or ""
        if not architecture.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
            raise BridgeError(
                "unsupported_model",
                f"Adapters are trained for models that generate text, and this one is "
                f"{architecture or 'none that its config names'}.",
                {"architecture": architecture},
            )
        return
    if quantizes:
        raise BridgeError(
            "invalid_option",
            f"The model is quantized already ({checkpoint.description}).",
            {"option": "load_in_4bit", "quantization": checkpoint.quant_method},
            remedy="Leave `load_in_4bit` and `load_in_8bit` out.",
        )
    if method.name == "bitsandbytes":
        return
    if method.name in _PACKED:
        why = _not_packed(method, checkpoint.quantization or {})
    else:
        why = _REFUSALS.get(method.name, "there are no layers for it that gradients go through")
    if why is not None:
        raise BridgeError(
            "unsupported_quantization",
            f"No adapter can be trained over {method.title or checkpoint.quant_method}: {why}.",
            {"quantization": checkpoint.quant_method},
            remedy=_PLAIN,
        )


def _method(checkpoint: Checkpoint) -> Method | None:
    named = checkpoint.quant_method
    return registry.meant_by(named) if named else None


def _not_packed(method: Method, config: Mapping[str, Any]) -> str | None:
    """Why the layers of ``packed`` are none of this checkpoint's; None where they are."""
    scheme = method.scheme(config)
    layouts, bits = _PACKED[method.name]
    if scheme.format is not None and scheme.format not in layouts:
        return f"this one stores its integers as `{scheme.format}`, for kernels that only serve"
    if scheme.bits not in bits:
        return f"gradients go through {', '.join(map(str, bits))} bits, not {scheme.bits}"
    if any(not rule.startswith("-:") for rule in config.get("dynamic") or {}):
        return "the settings of its layers differ (`dynamic`)"
    return None


def says(checkpoint: Checkpoint, settings: "Settings") -> str:
    """How the base is held while it is trained over, for people to read."""
    if settings.bitsandbytes.get("load_in_8bit"):
        return "bitsandbytes, 8 bits"
    if settings.bitsandbytes:
        double = settings.bitsandbytes["bnb_4bit_use_double_quant"]
        kind = settings.bitsandbytes["bnb_4bit_quant_type"]
        return f"bitsandbytes {kind}" + (" with double quantization" if double else "")
    if _packing(checkpoint) is not None:
        return (
            f"{checkpoint.description}; packed, computed exactly by this library's own layers "
            "(transformers' need gptqmodel, which contradicts vLLM)"
        )
    if checkpoint.quant_method:
        return str(checkpoint.description)
    return f"plain, {dtype(settings)}"


def dtype(settings: "Settings") -> str:
    """What the base's plain weights are, and what is computed in."""
    import torch

    if settings.own.dtype is not None:
        return settings.own.dtype
    # On the CPUs measured, bfloat16's backward pass took six times as long as float32's.
    return "bfloat16" if torch.cuda.is_available() else "float32"


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Raises ``unsupported_model`` where transformers does not load what is asked for in it."""
    try:
        yield
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise BridgeError(
            "unsupported_model",
            f"transformers does not load this model for training: {error}",
            {"exception": f"{type(error).__name__}: {error}"},
        ) from error


def load(checkpoint: Checkpoint, settings: "Settings") -> Any:
    """transformers' model, frozen, ready for an adapter.

    Raises:
        BridgeError: ``unsupported_model`` where transformers does not load it
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    folder = checkpoint.folder
    kind = getattr(torch, dtype(settings))
    with loading():
        config = AutoConfig.from_pretrained(folder)
    arguments: dict[str, Any] = {"config": config, "dtype": kind, "local_files_only": True}
    if (method := _packing(checkpoint)) is not None:
        config.quantization_config = _packed(checkpoint, method)
    if settings.bitsandbytes:
        arguments["quantization_config"] = BitsAndBytesConfig(
            **{"bnb_4bit_compute_dtype": kind, **settings.bitsandbytes}
        )
    if settings.bitsandbytes.get("load_in_8bit"):
        # Each product would say in the log that its inputs are rounded.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        arguments["device_map"] = {"": 0}
    with loading():
        model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    for module in model.modules():
        # On CPUs with AVX-512 the first answer has bitsandbytes lay the weights out for a kernel
        # that no gradient goes through, without a word, and for good.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    machine.give_back()
    return model


def with_adapter(model: Any, settings: "Settings") -> Any:
    """peft's model of a base and a new adapter.

    Raises:
        BridgeError: ``invalid_option`` where there is none for these options
    """
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings.lora))
    except ValueError as error:
        raise BridgeError(
            "invalid_option",
            f"peft puts no adapter on this model: {error}",
            {"option": "target_modules"},
        ) from error


def _packing(checkpoint: Checkpoint) -> Method | None:
    """The method whose layers are in ``packed``."""
    method = _method(checkpoint)
    return method if method is not None and method.name in _PACKED else None


def _packed(checkpoint: Checkpoint, method: Method) -> Mapping[str, Any]:
    from vllm_bridge.jobs.finetune import packed

    suffix = ".qweight"
    scheme = method.scheme(checkpoint.quantization or {})
    return {
        "quant_method": packed.METHOD,
        "layout": {
            "is_awq": method.name == "awq",
            "bits": scheme.bits,
            "group_size": scheme.group_size or 128,
            "is_symmetric": scheme.symmetric is not False,
            "is_ordered": any(name.endswith(".g_idx") for name in checkpoint.tensors),
            "format": scheme.format,
        },
        "modules": [
            name.removesuffix(suffix) for name in checkpoint.tensors if name.endswith(suffix)
        ],
    }


def tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)


def plain(model: Any) -> Any:
    """A loaded model with the weights of its quantized layers as plain numbers."""
    import torch

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return model.dequantize()
    if getattr(model, "quantization_method", None) is None:
        return model
    from vllm_bridge.jobs.finetune.packed import PackedLinear

    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            made = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            made.weight = torch.nn.Parameter(layer.weight, requires_grad=False)
            if layer.bias is not None:
                made.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made)
    model.hf_quantizer.remove_quantization_config(model)
    return model
