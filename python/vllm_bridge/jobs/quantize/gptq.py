"""GPTQ, by gptqmodel."""

from collections.abc import Mapping
from typing import Any, Literal

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import gptqmodel
from vllm_bridge.jobs.quantize.calibration import Texts
from vllm_bridge.jobs.quantize.producer import Made, Option, Source, Tell, declared

NAME = "gptq"

# What is for users of the library's options, and what it does: those that change what is made.
_DOCS = {
    "bits": "How many bits a weight has.",
    "group_size": "How many weights of a row share a scale; -1 is for all.",
    "desc_act": "Quantizes inputs in the order of their activations: better, and slower to run.",
    "sym": "Whether zero is in the middle of each group; without, groups have zero points.",
    "format": "How zero points are stored: `gptq_v2` has what `gptq` cannot say of them.",
    "damp_percent": "What is added to the diagonal of the Hessian, as a part of its mean.",
    "damp_auto_increment": "How much more is added where that was too little.",
    "act_group_aware": "Orders whole groups by their activations, which costs nothing to run.",
    "static_groups": "Whether scales are found before the order of `desc_act` is.",
    "mse": "The power of the error by which scales are found; 0 takes the extremes.",
    "true_sequential": "Whether parts of a layer see what the parts before them have lost.",
}


def options() -> Mapping[str, Option]:
    gptqmodel.library()
    from gptqmodel.quantization.config import GPTQConfig

    from vllm_bridge.quantization.gptq import format as loaded

    # The library has more, in a layout that nothing loads.
    better: dict[str, dict[str, Any]] = {name: {"doc": doc} for name, doc in _DOCS.items()}
    better["bits"] |= {"types": (int,), "allowed": loaded.BITS}
    better["format"] |= {"types": (str,), "default": "gptq", "allowed": tuple(loaded.STORES_ZEROS)}
    return declared(GPTQConfig.__init__, only=_DOCS, **better)


def presets() -> Mapping[str, Mapping[str, Any]]:
    return {f"{bits}bit": {"bits": bits} for bits in options()["bits"].allowed}


def texts(options: Mapping[str, Any]) -> Literal["unused", "optional", "required"]:
    return "required"


def check(source: Source | None, options: Mapping[str, Any]) -> None:
    config = _config(options)
    packed_by = gptqmodel.kernel(config, _backend())
    if config.act_group_aware and config.group_size == -1:
        raise BridgeError(
            "invalid_option",
            "`act_group_aware` orders groups, and with `group_size` -1 there is but one.",
            {"option": "act_group_aware", "group_size": -1},
            remedy="Leave one of them out.",
        )
    if source is not None:
        gptqmodel.check(source, config, packed_by)


def label(options: Mapping[str, Any]) -> str:
    group = "channel" if options["group_size"] == -1 else f"{options['group_size']}g"
    marks = "-act" * bool(options["desc_act"]) + "-asym" * (not options["sym"])
    return f"gptq-{options['bits']}bit-{group}{marks}"


def make(
    source: Source, options: Mapping[str, Any], texts: Texts | None, out: str, tell: Tell
) -> Made:
    return gptqmodel.make(source, options, _config(options), _backend(), texts, out, tell)


def _config(options: Mapping[str, Any]) -> Any:
    gptqmodel.library()
    from gptqmodel.quantization.config import GPTQConfig

    # Where all weights of a row are one group, there are no groups to order.
    is_one_group = options["group_size"] == -1 and options["act_group_aware"] is None
    changed = {"act_group_aware": False} if is_one_group else {}
    try:
        return GPTQConfig(**{**options, **changed}, offload_to_disk=False)
    except (TypeError, ValueError) as error:
        raise gptqmodel.invalid(error) from error


def _backend() -> Any:
    from gptqmodel import BACKEND

    return BACKEND.GPTQ_TORCH
