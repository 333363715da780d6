"""What is known of a checkpoint, as one value."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_bridge.checkpoints.headers import Tensor

# Bytes per element of the dtypes that vLLM casts to the engine's dtype while loading.
CAST = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

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
        bytes: what the weights take once they are loaded in two-byte floats, at least
        floats: how many elements of them are floats, which the engine's dtype rules
        tensors: what the headers of the files say, by name
        is_dequantized: whether FP8 weights are no such once they are loaded
        added: how many of ``bytes`` are there because weights are dequantized
        load_format: the one by which vLLM reads ``files``; None where there are none
        found: how it is quantized, where that is not in ``config``
    """

    folder: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: tuple[str, ...] = ()
    bytes: int = 0
    floats: int = 0
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    is_dequantized: bool = False
    added: int = 0
    load_format: str | None = None
    found: Mapping[str, Any] | None = None

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The config of its quantization method; None when it is not quantized."""
        for name in ("quantization_config", "compression_config"):
            for config in (self.config, self.config.get("text_config") or {}):
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
        for config in (self.config, self.config.get("text_config") or {}):
            for name in ("dtype", "torch_dtype"):
                if isinstance(found := config.get(name), str):
                    return found
        return None

    def dequantized(self, linear: bool, experts: bool) -> "Checkpoint":
        """The same with weights as floats of the engine's dtype, which is what they are once they
        are loaded where there is no kernel, quantized before or online. Scales are left as they
        are.

        Args:
            linear: whether that is so with FP8 weights of linear layers
            experts: and with those of experts, of 8 or 4 bits
        """
        size = floats = 0
        for name, tensor in self.tensors.items():
            if ".experts." in name:
                weights = self._weights_of_expert(name, tensor) if experts else 0
            else:
                eight = tensor.dtype == "F8_E4M3" and name.endswith(".weight")
                weights = tensor.size if linear and eight else 0
            if weights:
                floats += weights
                size += 2 * weights - tensor.size
        return dataclasses.replace(
            self,
            bytes=self.bytes + size,
            floats=self.floats + floats,
            is_dequantized=linear,
            added=size,
        )

    def _weights_of_expert(self, name: str, tensor: Tensor) -> int:
        """How many weights a tensor of an expert stands for; none if it is not quantized."""
        bits = {"F8_E4M3": 8, "I8": 8, "U8": 4, "I32": self._bits}.get(tensor.dtype)
        if bits is None or not name.endswith((".weight", ".qweight", ".weight_packed")):
            return 0
        return tensor.size * 8 // bits

    @property
    def _bits(self) -> int | None:
        """Of each weight, where they are packed into integers."""
        config = self.quantization or {}
        found = config.get("bits")
        if isinstance(groups := config.get("config_groups"), dict):
            weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
            found = next((one.get("num_bits") for one in weights if isinstance(one, dict)), None)
        return found if isinstance(found, int) and found > 0 else None

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
