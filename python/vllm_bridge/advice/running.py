"""Which formats run on a device, by the installed vLLM's word. Imports vLLM."""

from collections.abc import Iterable, Sequence
from typing import Final

from vllm_bridge.advice.ranking import Candidate
from vllm_bridge.advice.rules import Rules
from vllm_bridge.quantization import availability, table
from vllm_bridge.sizing.devices import Device

# vLLM's schemes of compressed-tensors, which may need more than the method does.
_SCHEMES: Final = {
    "compressed-tensors (W4A16)": "CompressedTensorsWNA16",
    "compressed-tensors (W8A8)": "CompressedTensorsW8A8Int8",
    "compressed-tensors (FP8)": "CompressedTensorsW8A16Fp8",
}


def refused(
    candidates: Iterable[Candidate], devices: Sequence[Device], is_here: bool, rules: Rules
) -> list[Candidate]:
    """The candidates, with the reason where one cannot run.

    Args:
        is_here: whether the devices are those of this machine, on which vLLM tries each format; of
            others it tells only what they must be
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = []
    for candidate in candidates:
        if candidate.method is not None:
            why = _here(candidate) if is_here else _there(candidate, devices, rules)
            candidate = candidate._replace(refusal=why)
        found.append(candidate)
    return found


def _here(candidate: Candidate) -> str:
    formats, online = availability.of_formats(), availability.of_methods_online()
    if candidate.name in formats:
        why = formats[candidate.name]
    elif candidate.method == "gguf":
        # Files mix types, which run alike.
        why = next(why for name, why in formats.items() if name.startswith("gguf"))
    else:
        why = online.get(candidate.method or "")
    return "" if why is None else f"vLLM cannot run it here: {why.rstrip('. ')}."


def _there(candidate: Candidate, devices: Sequence[Device], rules: Rules) -> str:
    for device in devices:
        if said := rules.refusal(candidate.name, device.kind, device.capability):
            return said
        least = _least(candidate)
        if device.kind != "cuda" or device.capability is None or least is None:
            continue
        if device.capability < least:
            return (
                f"vLLM has it for compute capability {least[0]}.{least[1]} and more, and "
                f"{device.name} has {device.capability[0]}.{device.capability[1]}."
            )
    return ""


def _least(candidate: Candidate) -> tuple[int, int] | None:
    """The least compute capability that vLLM states for a format."""
    from vllm.model_executor.layers.quantization.compressed_tensors import schemes

    least = table.capability(candidate.method or "")
    if least is None:
        return None
    scheme = getattr(schemes, _SCHEMES.get(candidate.name, ""), None)
    tens = (
        round(least * 10) if scheme is None else max(round(least * 10), scheme.get_min_capability())
    )
    return tens // 10, tens % 10
