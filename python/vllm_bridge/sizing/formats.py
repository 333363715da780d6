"""What a plain model would take in each of the formats that it can be quantized into.

The tools that make checkpoints quantize the matrices of attention, MLPs and experts, and leave the
embeddings, the output layer, routers, norms and what is beside the model of text in 16 bits. GGUF
files have everything in one type or another: ``gguf_types`` says which.
"""

import math
from collections import defaultdict
from typing import Final, NamedTuple

from vllm_bridge.checkpoints import gguf
from vllm_bridge.checkpoints.checkpoint import CAST, Checkpoint
from vllm_bridge.quantization import registry
from vllm_bridge.sizing import gguf_types, layers, parts
from vllm_bridge.sizing.fields import Fields
from vllm_bridge.sizing.parts import Part
from vllm_bridge.sizing.settings import ITEMSIZES


class InFormat(NamedTuple):
    """A model in a format.

    Args:
        method: vLLM's name of it; None for plain ones
        name: what people call it: ``awq (4 bits)``, ``Q4_K_M``
        disk: bytes of its files, at least
        memory: bytes of its weights once they are loaded, where the device has a kernel for them
    """

    method: str | None
    name: str
    disk: int
    memory: int


# The plain ones. What float32 takes in memory is where it is asked for: vLLM computes in 16 bits
# otherwise.
_PLAIN: Final = ("float32", "bfloat16", "float16")

_HALF: Final = ITEMSIZES["float16"]


def in_formats(checkpoint: Checkpoint) -> tuple[InFormat, ...]:
    """What a plain model takes as it is and would take in each format, the largest first. Empty for
    one that is quantized, and where its tensors are not known."""
    if checkpoint.quantization is not None or not checkpoint.tensors:
        return ()
    kept = _kept(checkpoint)
    if not all(part.tensor.dtype in CAST for part in kept):
        return ()
    elements = sum(part.elements * part.alike for part in kept)
    quantized = sum(part.elements * part.alike for part in kept if part.is_quantizable)
    sizes = {name: elements * ITEMSIZES[name] for name in _PLAIN}
    found = [InFormat(None, name, size, size) for name, size in sizes.items()]
    for method in registry.every():
        for form in method.formats if method.name != "gguf" else ():
            each = method.bytes_per_weight(form.config)
            if each is not None:
                rest = (elements - quantized) * _HALF
                found.append(
                    InFormat(
                        method.name,
                        form.name,
                        math.ceil(quantized * each.disk) + rest,
                        math.ceil(quantized * each.memory) + rest,
                    )
                )
    config = layers.text_config(checkpoint.config)
    found += [_gguf(name, kept, config) for name in gguf_types.FILES]
    return tuple(sorted(found, key=lambda one: -one.disk))


def gguf_bytes(checkpoint: Checkpoint, file: str) -> int:
    """What a GGUF file of this type would take. A type whose rules are not known here counts as the
    plainest of as many bits."""
    return _gguf(_known(file), _kept(checkpoint), layers.text_config(checkpoint.config)).disk


def gguf_weights(checkpoint: Checkpoint, file: str) -> dict[str, int]:
    """How many weights of each type a GGUF file of this type would have."""
    kept = _kept(checkpoint)
    model = _model(kept, layers.text_config(checkpoint.config))
    found: dict[str, int] = defaultdict(int)
    for part in kept:
        found[gguf_types.of(_known(file), part, model)] += part.elements * part.alike
    return found


def _known(file: str) -> str:
    return file if file in gguf_types.FILES else "Q3_K_S" if "3" in file else "Q2_K"


def _kept(checkpoint: Checkpoint) -> list[Part]:
    return [part for part in parts.parts(checkpoint, {}) if part.kind != parts.NOT_KEPT]


def _model(kept: list[Part], config: Fields) -> gguf_types.Model:
    return gguf_types.Model.of(config, not any(part.is_head for part in kept))


def _gguf(name: str, kept: list[Part], config: Fields) -> InFormat:
    model = _model(kept, config)
    disk, memory = gguf_types.header_bytes(config), 0
    for part in kept:
        kind = gguf.TYPES[gguf_types.of(name, part, model)]
        size = math.ceil(part.elements / kind.block) * kind.size
        disk += size * part.alike
        memory += part.alike * (size if kind.name in gguf.KEPT else part.elements * _HALF)
    return InFormat("gguf", name, disk, memory)
