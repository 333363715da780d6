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
        is_here: whether the devices are those of this machine, on which vLLM tries each format too;
            of others it tells only what they must be, as in ``check``
    """
    return [
        one._replace(refusal=one.refusal or _why_not(one, machine, is_here) or "")
        for one in candidates
    ]


def _why_not(candidate: Candidate, machine: Sequence[Device], is_here: bool) -> str | None:
    if candidate.method is None:
        return None
    if naming.resolve(candidate.method) is None:
        return naming.unknown(candidate.method).what
    refused = devices.refusal(candidate.name, candidate.method, machine)
    return refused or (_here(candidate) if is_here else None)


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
