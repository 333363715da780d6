"""AWQ, by gptqmodel."""

from collections.abc import Mapping
from typing import Any, Literal

from vllm_bridge.jobs.quantize import gptqmodel
from vllm_bridge.jobs.quantize.calibration import Texts
from vllm_bridge.jobs.quantize.producer import Made, Option, Source, Tell, declared

NAME = "awq"

_DOCS = {
    "bits": "How many bits a weight has: AWQ's format has four.",
    "group_size": "How many weights of a row share a scale and a zero point.",
}


def options() -> Mapping[str, Option]:
    gptqmodel.library()
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.config import AWQConfig

    sizes = tuple(size for size in AwqTorchLinear.SUPPORTS_GROUP_SIZE if size > 0)
    return declared(
        AWQConfig.__init__,
        only=_DOCS,
        bits={"types": (int,), "allowed": (4,), "doc": _DOCS["bits"]},
        group_size={"allowed": sizes, "doc": _DOCS["group_size"]},
    )


def presets() -> Mapping[str, Mapping[str, Any]]:
    return {f"{bits}bit": {"bits": bits} for bits in options()["bits"].allowed}


def texts(options: Mapping[str, Any]) -> Literal["unused", "optional", "required"]:
    return "required"


def check(source: Source | None, options: Mapping[str, Any]) -> None:
    config = _config(options)
    packed_by = gptqmodel.kernel(config, _backend())
    if source is not None:
        gptqmodel.check(source, config, packed_by)


def label(options: Mapping[str, Any]) -> str:
    return f"awq-{options['bits']}bit-{options['group_size']}g"


def make(
    source: Source, options: Mapping[str, Any], texts: Texts | None, out: str, tell: Tell
) -> Made:
    return gptqmodel.make(source, options, _config(options), _backend(), texts, out, tell)


def _config(options: Mapping[str, Any]) -> Any:
    gptqmodel.library()
    from gptqmodel.quantization.config import AWQConfig

    try:
        # The format has a zero point for each group.
        return AWQConfig(**options, sym=False, offload_to_disk=False)
    except (TypeError, ValueError) as error:
        raise gptqmodel.invalid(error) from error


def _backend() -> Any:
    from gptqmodel import BACKEND

    # What the library would choose by itself needs CUDA.
    return BACKEND.AWQ_TORCH
