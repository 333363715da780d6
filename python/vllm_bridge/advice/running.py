"""Which formats run on a device, by the installed vLLM's word. Imports vLLM."""

from collections.abc import Iterable, Sequence

from vllm_bridge import diagnosis
from vllm_bridge.advice.ranking import Candidate
from vllm_bridge.quantization import availability, devices, naming
from vllm_bridge.sizing.devices import Device


def refused(
    candidates: Iterable[Candidate], machine: Sequence[Device], is_here: bool
) -> list[Candidate]:
    """The candidates, with the reason where one cannot run.

    Args:
        is_here: whether the devices are those of this machine, on which vLLM tries each format; of
            others it tells only what they must be, as in ``check``
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = []
    for candidate in candidates:
        if candidate.method is not None and not candidate.refusal:
            why = _why_not(candidate, candidate.method, machine, is_here)
            candidate = candidate._replace(refusal=why or "")
        found.append(candidate)
    return found


def _why_not(
    candidate: Candidate, method: str, machine: Sequence[Device], is_here: bool
) -> str | None:
    if naming.resolve(method) is None:
        return naming.unknown(method).what
    return _here(candidate) if is_here else devices.refusal(candidate.name, method, machine)


def _here(candidate: Candidate) -> str | None:
    formats, online = availability.of_formats(), availability.of_methods_online()
    if candidate.name in formats:
        why = formats[candidate.name]
    elif candidate.method == "gguf":
        # Files mix types, which run alike.
        why = next(why for name, why in formats.items() if name.startswith("gguf"))
    else:
        why = online.get(candidate.method or "")
    return why and f"vLLM cannot run it here: {diagnosis.sentence(why)}"
