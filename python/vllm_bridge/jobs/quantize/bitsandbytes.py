"""bitsandbytes: NF4, FP4 and LLM.int8(). It looks at nothing but the weights."""

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import layers
from vllm_bridge.jobs.quantize.calibration import Texts
from vllm_bridge.jobs.quantize.producer import Made, Option, Source, Tell, declared

if TYPE_CHECKING:
    import torch

NAME = "bitsandbytes"

# What holds for a layer in 4 bits only, and in 8 bits only.
_IN_4_BITS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
_IN_8_BITS = ("llm_int8_threshold",)


def options() -> Mapping[str, Option]:
    from transformers import BitsAndBytesConfig

    # The rest is about training, other devices, and how the loaded model computes.
    return declared(
        BitsAndBytesConfig,
        only=("load_in_4bit", "load_in_8bit", *_IN_4_BITS, *_IN_8_BITS, "llm_int8_skip_modules"),
        load_in_4bit={"types": (bool,), "default": None, "doc": "The default; see load_in_8bit."},
        load_in_8bit={"types": (bool,), "default": None, "doc": "LLM.int8() in its place."},
        # transformers' default is FP4, and its guides tell everybody to take NF4.
        bnb_4bit_quant_type={"allowed": ("nf4", "fp4"), "default": "nf4"},
        llm_int8_threshold={
            "doc": "Activations beyond it are computed in 16 bits; 0 for none of them."
        },
        llm_int8_skip_modules={
            "types": (list,),
            "doc": "Layers that are left as they are: names, or parts of them.",
        },
    )


def presets() -> Mapping[str, Mapping[str, Any]]:
    return {
        "nf4": {"bnb_4bit_quant_type": "nf4"},
        "fp4": {"bnb_4bit_quant_type": "fp4"},
        "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4-double": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }


def texts(options: Mapping[str, Any]) -> Literal["unused", "optional", "required"]:
    return "unused"


def label(options: Mapping[str, Any]) -> str:
    if options["load_in_8bit"]:
        return "bnb-int8"
    double = "-double" if options["bnb_4bit_use_double_quant"] else ""
    return f"{options['bnb_4bit_quant_type']}{double}"


def check(source: Source | None, options: Mapping[str, Any]) -> None:
    if options["load_in_4bit"] is bool(options["load_in_8bit"]):
        raise BridgeError(
            "invalid_option",
            "`load_in_4bit` and `load_in_8bit` are "
            + ("both asked for." if options["load_in_4bit"] else "both false."),
            {"option": "load_in_8bit", "value": options["load_in_8bit"]},
            remedy="Give one of them.",
        )
    if source is not None:
        found, _left = layers.linear(source, options["llm_int8_skip_modules"] or ())
        if layers.left_out(source, found):
            raise BridgeError(
                "unsupported",
                f"`{source.path}` has experts that are no linear layers in transformers: they "
                "would stay as they are, and vLLM loads no model of bitsandbytes with such ones.",
                {"model": source.path, "architecture": source.checkpoint.architecture},
                remedy="GGUF and compressed-tensors have experts quantized.",
            )


def make(
    source: Source,
    options: Mapping[str, Any],
    texts: Texts | None,
    out: str,
    tell: Tell,
) -> Made:
    import bitsandbytes as bnb
    import torch
    from transformers import BitsAndBytesConfig

    in_8_bits = bool(options["load_in_8bit"])
    kind, double = (options[name] for name in _IN_4_BITS)
    found, left = layers.linear(source, options["llm_int8_skip_modules"] or ())
    config = BitsAndBytesConfig(
        load_in_4bit=not in_8_bits,
        load_in_8bit=in_8_bits,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_threshold=options["llm_int8_threshold"],
        llm_int8_skip_modules=left,
    )

    def quantize(_name: str, weight: "torch.Tensor") -> Mapping[str, "torch.Tensor"]:
        rows, columns = weight.shape
        layer: Any
        with torch.device("meta"):
            if in_8_bits:
                layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
            else:
                layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=kind)
        if in_8_bits:
            layer.weight = bnb.nn.Int8Params(
                weight.half(), requires_grad=False, has_fp16_weights=False
            )
        else:
            layer.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type=kind, compress_statistics=double
            )
        # Moving a layer to its device is what quantizes it. Its first use would pack it once more,
        # for the kernels of this processor.
        return dict(layer.to("cpu").state_dict())

    layers.rewrite(source, out, found, quantize, config.to_dict(), tell)
    without = _IN_4_BITS if in_8_bits else _IN_8_BITS
    had_effect = {name: value for name, value in options.items() if name not in without}
    had_effect |= {"load_in_4bit": not in_8_bits, "load_in_8bit": in_8_bits}
    libraries = ("bitsandbytes", "transformers", "torch")
    return Made(
        {name: metadata.version(name) for name in libraries},
        had_effect,
        layers.left_out(source, found),
    )
