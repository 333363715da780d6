"""bitsandbytes, by a plugin of vLLM: 4 bits as NF4 or FP4 in blocks of 64, or LLM.int8()."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import packed_weights
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Extra, Format, Grouped, Method, Online
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

_BLOCK = 64
_FLOAT32 = 32


class BitsAndBytes(Method):
    name = "bitsandbytes"
    title = "bitsandbytes"
    other_names = ("bnb", "nf4")
    extra = Extra(
        "bitsandbytes", {"bitsandbytes": "bitsandbytes", "vllm-bnb-plugin": "vllm_bnb_plugin"}
    )
    formats = (
        Format("bitsandbytes (4 bits)", {"load_in_4bit": True}),
        Format("bitsandbytes (8 bits)", {"load_in_8bit": True}),
    )
    online = Online(
        bytes=Grouped(4, _BLOCK, _FLOAT32).bytes().memory,
        dtype="int4",
        words="4-bit weights (NF4), by bitsandbytes",
        as_read=True,
    )
    note = "quantizes each weight as it is read"
    load_format = "bitsandbytes"
    has_final_shapes = False
    # Its loader looks for experts where older versions of vLLM had them.
    no_online_experts = "the plugin for bitsandbytes does not find them while it quantizes a model"

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        said = scheme.usual(config)._replace(symmetric=True, producer="transformers")
        if config.get("load_in_8bit"):
            return said._replace(format="int8", bits=8, strategy="channel", activation_bits=8)
        kind = scheme.text(config, "bnb_4bit_quant_type") or "fp4"
        double = " double" if config.get("bnb_4bit_use_double_quant") else ""
        return said._replace(format=kind + double, bits=4, group_size=_BLOCK, strategy="group")

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        if config.get("load_in_8bit"):
            return Bytes(1.0, 1.0)
        plain = Grouped(4, _BLOCK, _FLOAT32).bytes()
        if not config.get("bnb_4bit_use_double_quant"):
            return plain
        # In files, scales have 8 bits each, and scales of their own.
        return Bytes(Grouped(4, _BLOCK, 8).bytes().disk, plain.memory)

    def check(self, checkpoint: "Checkpoint") -> None:
        packed_weights.check_bitsandbytes(checkpoint)

    def check_layer(self, config: Any, layer: Any) -> None:
        # vLLM makes room for the packed bytes, and counts them by the dtype that the model
        # computes in.
        weights = layer.input_size * layer.output_size
        packed = weights if config.quant_config.load_in_8bit else weights // 2
        if layer.weight.numel() != packed:
            dtype = str(config.model_config.dtype).removeprefix("torch.")
            raise BridgeError(
                "unsupported_quantization",
                f"With bitsandbytes a model cannot compute in {dtype} here.",
                {"option": "dtype", "value": dtype},
                remedy='Leave `dtype` out, or give `dtype: "bfloat16"`.',
            )
