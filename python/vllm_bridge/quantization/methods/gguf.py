"""GGUF, the format of llama.cpp's files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import gguf, gguf_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import activations, scheme
from vllm_bridge.quantization.method import Bytes, Extra, Format, Method
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

# Of a number in the dtype that a model computes in.
_FLOAT = 2.0


class GGUF(Method):
    name = "gguf"
    title = "GGUF"
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

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        parts = {
            name: part
            for name, part in scheme.mapping(config, "types").items()
            if name in gguf.TYPES and gguf.TYPES[name].block > 1
        }
        most = max(parts, key=parts.__getitem__, default=None)
        plain = next(iter(scheme.mapping(config, "types")), None)
        form = scheme.text(config, "file_type") or most or plain
        said = Scheme(format=form, producer=scheme.text(config, "quantized_by"))
        if most is None:
            return said._replace(bits=scheme.digits(form or ""))
        return said._replace(
            bits=scheme.digits(most), group_size=gguf.TYPES[most].block, strategy="group"
        )

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

        # As llama.cpp does, they are rounded unless it is said that they should not be.
        value = activations.take(arguments)
        if more := arguments.pop("quantization_config", None):
            raise activations.refused(
                "For a GGUF file `quantization_config` says how products are computed, by "
                "`activations`, and by nothing else.",
                more,
            )
        return unfold(checkpoint, arguments, {} if value is None else {"activations": value})

    def ready_for_look(self, quant_config: Any, config: Mapping[str, Any], name: str) -> None:
        (type,) = config["types"]
        quant_config.take({f"{name}.weight": type})

    def check_layer(self, config: Any, layer: Any) -> None:
        from vllm.platforms import current_platform

        model = config.model_config
        if model.is_moe and not (current_platform.is_cpu() or model.enforce_eager):
            raise BridgeError(
                "unsupported_quantization",
                "The experts of a mixture in a GGUF file are computed one after another, as "
                "tokens are sent to them, which no CUDA graph can hold.",
                {"option": "enforce_eager", "value": False},
                remedy="Give `enforce_eager: true`.",
            )
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
            is_exact = config.quant_config.is_exact
            where = (
                kernels.kernel(is_exact) if current_platform.is_cpu() else "torch, layer by layer"
            )
            said.append(f"Weights stay packed as in the GGUF file ({kept}), computed by {where}.")
        if others:
            said.append(f"Those in {others} are {dtype} once they are loaded.")
        return " ".join(said)

    def install(self) -> None:
        from vllm_bridge.quantization.gguf import layers, loader  # noqa: F401
