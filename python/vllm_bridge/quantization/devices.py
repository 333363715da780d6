"""What devices must be for a format of weights: by the installed vLLM's word, and where it has none
without the device, by its documentation. Imports vLLM.
"""

import ast
import functools
from collections.abc import Iterator, Sequence
from typing import Final

from vllm_bridge import vllm_source
from vllm_bridge.quantization import naming, table
from vllm_bridge.sizing.devices import Device

# vLLM's schemes of compressed-tensors, which may need more than the method does.
_SCHEMES: Final = {
    "compressed-tensors (W4A16)": "CompressedTensorsWNA16",
    "compressed-tensors (W8A8)": "CompressedTensorsW8A8Int8",
    "compressed-tensors (FP8)": "CompressedTensorsW8A16Fp8",
}

# Formats that have no kernel from a compute capability on. Source:
# docs.vllm.ai/en/latest/features/quantization/int8
_BELOW: Final = {"compressed-tensors (W8A8)": (10, 0)}

# Platforms on which vLLM runs only the methods of a list.
_PLATFORMS: Final = ("rocm", "xpu")


def refusal(form: str, method: str, machine: Sequence[Device]) -> str | None:
    """Why a format cannot run on one of the devices; None where nothing is known against it.

    Args:
        form: a format's name, as methods have it, such as ``compressed-tensors (W8A8)``
        method: of it
    """
    return next(_refusals(form, method, machine), None)


def dotted(capability: tuple[int, int]) -> str:
    """``7.5``"""
    return ".".join(map(str, capability))


def _refusals(form: str, method: str, machine: Sequence[Device]) -> Iterator[str]:
    name = naming.resolve(method)
    for device in machine:
        if device.kind in _PLATFORMS and (runs := _runs(device.kind)) and name not in runs:
            yield f"vLLM does not run {method} on {device.name} ({device.kind})."
        if device.kind != "cuda" or device.capability is None:
            continue
        least, below = _least(form, name), _BELOW.get(form)
        if least is not None and device.capability < least:
            yield (
                f"{form} needs a GPU of compute capability {dotted(least)}; {device.name} has "
                f"{dotted(device.capability)}."
            )
        if below is not None and device.capability >= below:
            yield (
                f"vLLM has no kernel for {form} from compute capability {dotted(below)} on; "
                f"{device.name} has {dotted(device.capability)}."
            )


def _least(form: str, name: str | None) -> tuple[int, int] | None:
    """The least compute capability that vLLM states; None where it does not."""
    from vllm.model_executor.layers.quantization.compressed_tensors import schemes

    tenths = None if name is None else table.least_capability(name)
    if tenths is None:
        return None
    scheme = getattr(schemes, _SCHEMES.get(form, ""), None)
    return divmod(tenths if scheme is None else max(tenths, scheme.get_min_capability()), 10)


@functools.cache
def _runs(platform: str) -> frozenset[str]:
    """vLLM's list of methods for a platform, whose module cannot be imported elsewhere."""
    source = vllm_source.module("platforms", platform)
    for node in ast.walk(source) if source is not None else ():
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == "supported_quantization"
            and isinstance(node.value, ast.List)
        ):
            return frozenset(ast.literal_eval(node.value))
    return frozenset()
