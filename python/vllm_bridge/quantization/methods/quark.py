"""AMD's Quark: floats or integers of 4 to 8 bits, by layer."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Grouped, Method
from vllm_bridge.quantization.scheme import Scheme


class Quark(Method):
    name = "quark"
    title = "Quark"
    bits = (4, 6, 8)
    needs_checkpoint = True
    other_names = ("amd-quark",)
    note = "AMD's; FP8, MXFP4 and MXFP6 checkpoints are usual"

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        said = scheme.usual(config)
        layers = scheme.mapping(config, "global_quant_config")
        weight, inputs = scheme.mapping(layers, "weight"), scheme.mapping(layers, "input_tensors")
        form = scheme.text(weight, "dtype")
        strategy = (scheme.text(weight, "qscheme") or "").removeprefix("per_") or None
        # The KV cache is quantized as what these layers put out.
        named = scheme.names(scheme.mapping(config, "export").get("kv_cache_group"))
        rules = scheme.mapping(config, "layer_quant_config")
        caches = [scheme.mapping(scheme.mapping(rules, n), "output_tensors") for n in named]
        cache = scheme.text(caches[0], "dtype") if caches else None
        return said._replace(
            format=form,
            bits=_bits(form),
            group_size=scheme.integer(weight, "group_size"),
            strategy=strategy,
            symmetric=scheme.boolean(weight, "symmetric"),
            activation_bits=_bits(scheme.text(inputs, "dtype")),
            activations=None if not inputs else "dynamic" if inputs.get("is_dynamic") else "static",
            kv_cache=cache.partition("_")[0] if cache else None,
            producer=said.producer or scheme.made_by("Quark", config.get("quark_version")),
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes | None:
        said = self.scheme(config)
        if said.bits is None:
            return None
        scale_bits = 8 if said.format == "fp4" else 32
        return Grouped(said.bits, said.group_size or 0, scale_bits).bytes()


def _bits(dtype: str | None) -> int | None:
    """Of ``fp8_e4m3``, ``int4``, ``uint4``, ``fp4``, …"""
    return None if dtype is None else scheme.digits(dtype)
