"""GGUF, the format of llama.cpp's files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import gguf, gguf_model
from vllm_bridge.quantization.method import Bytes, Extra, Format, Method

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

# Of a number in the dtype that a model computes in.
_FLOAT = 2.0


class GGUF(Method):
    name = "gguf"
    other_names = ("ggml", "llama.cpp", "llama-cpp")
    extra = Extra("gguf", {"gguf": "gguf"}, faster={"ggml-python": "ggml"})
    formats = tuple(
        Format(f"gguf ({name})", {"types": {name: 1.0}})
        for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
    )
    note = (
        "weights stay as packed as the file has them; with ggml llama.cpp's own kernels compute; "
        "files such as Q4_K_M mix types, and there are more types than these"
    )
    needs_checkpoint = True
    load_format = "gguf"
    has_final_shapes = False

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes | None:
        types = config.get("types") or {}
        if not types:
            return None
        sizes = {name: gguf.TYPES[name].size / gguf.TYPES[name].block for name in types}
        return Bytes(
            sum(part * sizes[name] for name, part in types.items()),
            sum(
                part * (sizes[name] if name in gguf.KEPT else _FLOAT)
                for name, part in types.items()
            ),
        )

    def check(self, checkpoint: "Checkpoint") -> None:
        gguf_model.check(checkpoint)

    def prepare(self, checkpoint: "Checkpoint", arguments: dict[str, Any]) -> str | None:
        from vllm_bridge.quantization.gguf.unfold import unfold

        return unfold(checkpoint, arguments)

    def check_layer(self, config: Any, layer: Any) -> None:
        config.quant_config.check_ranks(config.parallel_config.tensor_parallel_size)

    def loaded_note(self, config: Any) -> str:
        from vllm.platforms import current_platform

        from vllm_bridge.quantization.gguf import kernels

        shares = config.quant_config.shares
        kept = ", ".join(f"{part:.0%} {name}" for name, part in shares.items() if name in gguf.KEPT)
        others = ", ".join(name for name in shares if name not in gguf.KEPT)
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        said = []
        if kept:
            where = kernels.kernel() if current_platform.is_cpu() else "torch, layer by layer"
            said.append(f"Weights stay packed as in the GGUF file ({kept}), computed by {where}.")
        if others:
            said.append(f"Those in {others} are {dtype} once they are loaded.")
        return " ".join(said)

    def install(self) -> None:
        from vllm_bridge.quantization.gguf import layers, loader  # noqa: F401
