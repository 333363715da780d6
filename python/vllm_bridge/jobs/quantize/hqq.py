"""HQQ, by the library hqq. It looks at nothing but the weights."""

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import layers
from vllm_bridge.jobs.quantize.calibration import Texts
from vllm_bridge.jobs.quantize.producer import Made, Option, Source, Tell, declared

if TYPE_CHECKING:
    import torch

NAME = "hqq"

SKIPPED = Option(
    "skip_modules", (list,), None, doc="Layers that are left as they are: names, or parts of them."
)

# What of hqq's own settings its files cannot hold: it says so, and leaves them out in time.
_DEPRECATED = ("quant_zero", "quant_scale", "offload_meta")


def options() -> Mapping[str, Option]:
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    own = declared(
        BaseQuantizeConfig,
        without=(*_DEPRECATED, "view_as_float"),
        nbits={
            "types": (int, float),
            "allowed": tuple(Quantizer.SUPPORTED_BITS),
            "doc": "Bits of an integer; 1.58 for three values.",
        },
        group_size={
            "types": (int,),
            "doc": "How many weights share a scale: a multiple of 8 that divides a layer's.",
        },
        axis={
            "allowed": (0, 1),
            "doc": "1 where the weights of a group follow each other, 0 where they are as far from "
            "each other as they can be.",
        },
    )
    return own | {SKIPPED.name: SKIPPED}


def presets() -> Mapping[str, Mapping[str, Any]]:
    bits = options()["nbits"].allowed
    return {f"{number}bit": {"nbits": number} for number in bits}


def texts(options: Mapping[str, Any]) -> Literal["unused", "optional", "required"]:
    return "unused"


def label(options: Mapping[str, Any]) -> str:
    axis = "" if options["axis"] == 1 else f"-axis{options['axis']}"
    return f"hqq-{options['nbits']}bit-{options['group_size']}g{axis}"


def check(source: Source | None, options: Mapping[str, Any]) -> None:
    group = options["group_size"]
    if group < 8 or group % 8:
        raise BridgeError(
            "invalid_option",
            f"`group_size` is {group}, and hqq's groups are multiples of 8.",
            {"option": "group_size", "value": group},
            remedy="64 is usual.",
        )
    if source is None:
        return
    found, _ = layers.linear(source, options["skip_modules"] or ())
    for name in found:
        rows, columns = source.checkpoint.tensors[f"{name}.weight"].shape
        if rows * columns % group:
            raise BridgeError(
                "unsupported",
                f"The layer `{name}` has {rows} x {columns} weights, which are no whole groups of "
                f"{group}.",
                {"option": "group_size", "value": group, "layer": name},
                remedy="Choose a `group_size` that divides them, or leave the layer out with "
                "`skip_modules`.",
            )


def make(
    source: Source,
    options: Mapping[str, Any],
    texts: Texts | None,
    out: str,
    tell: Tell,
) -> Made:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = {name: options[name] for name in ("nbits", "group_size", "axis")}
    config = BaseQuantizeConfig(**settings)
    found, left = layers.linear(source, options["skip_modules"] or ())

    def quantize(_name: str, weight: "torch.Tensor") -> Mapping[str, "torch.Tensor"]:
        with torch.device("meta"):
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        layer = HQQLinear(linear, dict(config), compute_dtype=torch.float16, device="cpu")
        return {name: value.detach() for name, value in layer.state_dict().items()}

    quantization_config = {
        "quant_method": "hqq",
        "quant_config": config,
        "skip_modules": left,
    }
    layers.rewrite(source, out, found, quantize, quantization_config, tell)
    return Made(
        {name: metadata.version(name) for name in ("hqq", "torch")},
        dict(options),
        layers.left_out(source, found),
    )
