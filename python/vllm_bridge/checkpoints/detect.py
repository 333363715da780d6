"""How a model is quantized, from its config and the headers of its files. Imports neither torch nor
vLLM, and reads no weights.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from vllm_bridge.checkpoints import adapter, headers, parameters
from vllm_bridge.checkpoints.adapter import Adapter
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_model, is_elsewhere, locate, look_at
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import ghost
from vllm_bridge.quantization import registry, scheme
from vllm_bridge.quantization.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Detected:
    """What a model is, and how it is quantized.

    Args:
        method: vLLM's name of the method; None for a plain model and for an adapter
        title: how people write it
        made_for: the program whose own format it is, where vLLM does not load it
        scheme: how its weights are quantized; of a plain model nothing
        bits: of each quantized weight; the average where they differ
        bits_per_weight: of all that is stored, scales and plain layers included, over all weights
        dtype: what the model computes in, by its config
        parameters: weights, with packed ones counted as what they stand for; None where the headers
            of its files cannot be read
        bytes: of the tensors in its files; None like ``parameters``
        architecture: the class that the config names
        base_model: what it was made of, as far as it says so
        adapter: for a folder that is an adapter, and no model
    """

    method: str | None = None
    title: str | None = None
    made_for: str | None = None
    scheme: Scheme = dataclasses.field(default_factory=Scheme)
    bits: float | None = None
    bits_per_weight: float | None = None
    dtype: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    architecture: str | None = None
    model_type: str | None = None
    base_model: str | None = None
    adapter: Adapter | None = None

    def to_wire(self) -> dict[str, Any]:
        wire = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        wire |= wire.pop("scheme")._asdict() | {"bits": self.bits}
        if self.adapter is not None:
            wire["adapter"] = self.adapter._asdict()
        return wire


def detect(model: str, options: Mapping[str, Any]) -> Detected:
    """Looks at a model or an adapter.

    Args:
        options: of the engine that it would be loaded with, as the user gave them

    Raises:
        BridgeError: see ``check_model``; ``invalid_checkpoint``
    """
    if is_elsewhere(model):
        return of(check_model(model, options))
    place = locate(model, options)
    if not _is_adapter(place.path):
        return of(look_at(place, options))
    try:
        return _of_adapter(place.path)
    except BridgeError as error:
        raise ghost.named(error) from error


def of(checkpoint: Checkpoint) -> Detected:
    """What a checkpoint is."""
    config, named = checkpoint.config, checkpoint.quant_method
    method = registry.meant_by(named or "")
    said = Scheme() if named is None else method.scheme(checkpoint.quantization or {})
    if "unsloth_version" in config or "unsloth_fixed" in config:
        maker = scheme.made_by("Unsloth", config.get("unsloth_version"))
        said = said._replace(producer=maker if named else None)
    found = list(parameters.counts(checkpoint, said))
    count = sum(one.number for one in found)
    size = sum(tensor.size for tensor in checkpoint.tensors.values())
    packed = [(one.number, one.bits) for one in found if one.bits is not None]
    bits = said.bits
    if len({each for _, each in packed}) > 1:
        total = sum(number for number, _ in packed)
        bits = round(sum(number * each for number, each in packed) / total, 2)
    return Detected(
        method=named and (method.name or named),
        title=named and (method.title or named),
        made_for=method.made_for,
        scheme=said,
        bits=bits,
        bits_per_weight=round(8 * size / count, 2) if count else None,
        dtype=checkpoint.dtype,
        parameters=count or None,
        bytes=size or None,
        architecture=checkpoint.architecture,
        model_type=scheme.text(config, "model_type"),
        base_model=_source(checkpoint),
    )


def format_name(detected: Detected) -> str:
    """What the format of a model is called among ``Method.formats``, and GGUF's mixes in the same
    way; ``plain`` where it has none."""
    method, said = detected.method, detected.scheme
    if method is None:
        return "plain"
    if method == "gguf":
        return f"gguf ({said.format})"
    if method == "compressed-tensors":
        if said.activation_bits is None:
            return f"compressed-tensors (W{detected.bits:g}A16)"
        is_float = "float" in (said.format or "")
        return f"compressed-tensors ({'FP8' if is_float else 'W8A8'})"
    # auto-round's checkpoints are laid out as GPTQ's, and computed by the same kernels.
    method = "gptq" if method == "inc" else method
    known = registry.of(method).formats
    has_one = len(known) < 2 and not any("bits" in form.name for form in known)
    return method if has_one or detected.bits is None else f"{method} ({detected.bits:g} bits)"


def _source(checkpoint: Checkpoint) -> str | None:
    """The name on the hub that a model was made of; folders of somebody's machine are none."""
    source = scheme.text(checkpoint.quantization or {}, "base_model")
    source = source or scheme.text(checkpoint.config, "_name_or_path")
    if source is None or source.count("/") != 1 or source.startswith((".", "/", "~")):
        return None
    return source


def _is_adapter(path: str) -> bool:
    return os.path.exists(os.path.join(path, adapter.CONFIG)) and not os.path.exists(
        os.path.join(path, "config.json")
    )


def _of_adapter(folder: str) -> Detected:
    found = adapter.read(folder)
    path = os.path.join(folder, adapter.WEIGHTS[0])
    tensors = headers.read_header(path) if os.path.exists(path) else {}
    checkpoint = Checkpoint(folder, tensors=tensors)
    count = sum(one.number for one in parameters.counts(checkpoint, Scheme()))
    return Detected(
        parameters=count or None,
        bytes=sum(tensor.size for tensor in tensors.values()) or None,
        base_model=found.base_model,
        adapter=found,
    )
