"""torchao: above all weights in 8 bits with a scale for each row. It looks at nothing but the
weights."""

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import layers
from vllm_bridge.jobs.quantize.calibration import Texts
from vllm_bridge.jobs.quantize.producer import Made, Option, Source, Tell
from vllm_bridge.quantization.methods import torchao

if TYPE_CHECKING:
    import torch

NAME = "torchao"

# The names of the usual ones.
_SHORT = {
    "int8": "Int8WeightOnlyConfig",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "fp8": "Float8WeightOnlyConfig",
}

# A layer on which it is tried whether a config works here: (outputs, inputs).
_TRIED = (256, 256)


def options() -> Mapping[str, Option]:
    return {
        "quant_type": Option(
            "quant_type",
            (str, dict),
            torchao.DEFAULT,
            doc="The name of one of torchao's configs, or a map with the name as `type` and the "
            "config's arguments.",
        ),
        "modules_to_not_convert": Option(
            "modules_to_not_convert",
            (list,),
            doc="Layers that are left as they are: names, or parts of them.",
        ),
    }


def presets() -> Mapping[str, Mapping[str, Any]]:
    return {short: {"quant_type": name} for short, name in _SHORT.items()}


def texts(options: Mapping[str, Any]) -> Literal["unused", "optional", "required"]:
    return "unused"


def label(options: Mapping[str, Any]) -> str:
    kind = options["quant_type"]
    name = kind.get("type", torchao.DEFAULT) if isinstance(kind, dict) else kind
    short = {long: short for short, long in _SHORT.items()}.get(name)
    words = short or name.removesuffix("Config").lower()
    group = kind.get("group_size") if isinstance(kind, dict) else None
    return f"torchao-{words}" + (f"-{group}g" if group else "")


def check(source: Source | None, options: Mapping[str, Any]) -> None:
    import torch

    name, said = torchao.settings(options["quant_type"], "quant_type")
    try:
        weight = torch.zeros(_TRIED, dtype=torch.bfloat16)
        tensors, _ = _flat({"layer.weight": _quantized(weight, said)})
        works = "layer.weight" not in tensors
    except Exception as error:  # whatever its kernels think of this machine
        raise _refused(name, f"{type(error).__name__}: {error}") from error
    if not works:
        raise _refused(name, "it leaves linear layers as they are")
    if source is not None:
        layers.linear(source, options["modules_to_not_convert"] or ())


def _refused(name: str, why: str) -> BridgeError:
    return BridgeError(
        "unsupported",
        f"torchao {metadata.version('torchao')} does not make checkpoints with `{name}` here: "
        f"{why}",
        {"option": "quant_type", "value": name},
        remedy=f"Use another of its configs; `{torchao.DEFAULT}` works everywhere.",
    )


def make(
    source: Source,
    options: Mapping[str, Any],
    texts: Texts | None,
    out: str,
    tell: Tell,
) -> Made:
    _, said = torchao.settings(options["quant_type"], "quant_type")
    found, left = layers.linear(source, options["modules_to_not_convert"] or ())

    def quantize(_name: str, weight: "torch.Tensor") -> Mapping[str, "torch.Tensor"]:
        return {"weight": _quantized(weight, said)}

    quantization_config = {
        "quant_method": "torchao",
        "quant_type": {"default": said},
        "modules_to_not_convert": left,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
    layers.rewrite(source, out, found, quantize, quantization_config, tell, _flat)
    return Made(
        {name: metadata.version(name) for name in ("torchao", "torch")},
        dict(options),
        layers.left_out(source, found),
    )


def _quantized(weight: "torch.Tensor", said: Any) -> "torch.Tensor":
    """A weight as torchao has it, which is a class of tensors of its own."""
    import torch
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    with torch.device("meta"):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.Sequential(linear)
    quantize_(model, config_from_dict(said))
    return model[0].weight.data


def _flat(tensors: dict[str, Any]) -> tuple[dict[str, "torch.Tensor"], dict[str, str]]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    return flatten_tensor_state_dict(tensors)  # type: ignore[no-any-return]
