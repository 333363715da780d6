"""What is known of a checkpoint, as one value."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_bridge.checkpoints.headers import Tensor

if TYPE_CHECKING:
    from vllm_bridge.hub.repository import Repository

# The dtypes that vLLM casts to the engine's dtype while loading.
CAST = frozenset({"F64", "F32", "F16", "BF16"})

# vLLM's methods for what NVIDIA's ModelOpt makes, by its algorithms.
_MODELOPT = {
    "NVFP4": "modelopt_fp4",
    "MXFP8": "modelopt_mxfp8",
    "MIXED_PRECISION": "modelopt_mixed",
}


class Found(NamedTuple):
    """What other files than ``config.json`` say of a model.

    Args:
        config: its ``quantization_config``
        files: those with its weights; none where they are where those of plain models are
        tensors: what is in them
        load_format: the one by which vLLM reads them
    """

    config: Mapping[str, Any]
    files: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = {}
    load_format: str | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the files of a model say.

    Args:
        folder: where they are; None for a model that is still to be downloaded
        config: its ``config.json``; empty where there is none to read
        files: the files with its weights, in ``folder``
        tensors: what the headers of the files say, by name
        is_dequantized: whether FP8 weights of linear layers are floats of the engine's dtype once
            they are loaded, because there is no kernel for them; also those that are quantized
            online
        are_experts_dequantized: the same of weights of experts, of 8 or 4 bits; those of GGUF files
            stay packed
        load_format: the one by which vLLM reads ``files``; None where there are none
        found: how it is quantized, where that is not in ``config``
        repository: where its weights are still to be fetched from; None where they are here
    """

    folder: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    is_dequantized: bool = False
    are_experts_dequantized: bool = False
    load_format: str | None = None
    found: Mapping[str, Any] | None = None
    repository: "Repository | None" = None

    @property
    def _configs(self) -> tuple[Mapping[str, Any], ...]:
        """The model's config, and that of its language model."""
        text = self.config.get("text_config")
        return (self.config, text) if isinstance(text, dict) else (self.config,)

    @property
    def architecture(self) -> str | None:
        """The first of those that its config names: ``LlamaForCausalLM``."""
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else None
        return first if isinstance(first, str) else None

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The config of its quantization method; None when it is not quantized."""
        for name in ("quantization_config", "compression_config"):
            for config in self._configs:
                if isinstance(found := config.get(name), dict):
                    return found
        own = self.config.get("quantization")
        return own if isinstance(own, dict) and _is_mlx(own) else self.found

    @property
    def quant_method(self) -> str | None:
        return _quant_method(self.quantization)

    @property
    def dtype(self) -> str | None:
        """What the model computes in by its config: ``bfloat16``."""
        for config in self._configs:
            for name in ("dtype", "torch_dtype"):
                if isinstance(found := config.get(name), str):
                    return found
        return None

    @property
    def description(self) -> str:
        """How it is quantized, in a few words: "awq (4 bits, groups of 128)"."""
        config = self.quantization or {}
        words = []
        if bits := config.get("bits") or config.get("w_bit") or config.get("wbits"):
            words.append(f"{bits} bits")
        if isinstance(group := config.get("group_size") or config.get("q_group_size"), int):
            words.append(f"groups of {group}" if group > 0 else "no groups")
        if config.get("sym") is False:
            words.append("asymmetric")
        if config.get("desc_act"):
            words.append("desc_act")
        words += [name for name in ("load_in_4bit", "load_in_8bit") if config.get(name)]
        if isinstance(form := config.get("format"), str) and "quantized" in form:
            words.append(form)
        if isinstance(types := config.get("types"), dict):
            words += types
        method = self.quant_method or "nothing"
        return f"{method} ({', '.join(words)})" if words else method


def _quant_method(config: Mapping[str, Any] | None) -> str | None:
    if config is None:
        return None
    method = config.get("quant_method") or ""
    own = config.get("quantization")
    algorithm = (own if isinstance(own, dict) else config).get("quant_algo")
    # ModelOpt has one name for what vLLM has several for.
    if isinstance(algorithm, str) and (not method or method == "modelopt"):
        return _MODELOPT.get(algorithm.upper(), "modelopt")
    if isinstance(method, str) and method:
        return method
    # bitsandbytes of old wrote its settings without a name.
    if config.get("load_in_8bit") or config.get("load_in_4bit"):
        return "bitsandbytes"
    return "mlx" if _is_mlx(config) else None


def _is_mlx(config: Any) -> bool:
    """Whether this is what MLX writes of a quantization, which has no name in it."""
    if not isinstance(config, dict) or "quant_method" in config:
        return False
    # Layers that differ have an entry of their own.
    settings = {name for name, one in config.items() if not (isinstance(one, dict) or "." in name)}
    return {"bits", "group_size"} <= settings <= {"bits", "group_size", "mode"}
