"""compressed-tensors, of llm-compressor: integers or floats of 4 or 8 bits, packed or not."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import packed_weights
from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint


def _config(form: str, bits: int, kind: str, **groups: Any) -> Mapping[str, Any]:
    """What a checkpoint says whose linear layers are all quantized in one way."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False} | groups
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if groups["strategy"] == "channel":
        group["input_activations"] = weights | {"strategy": "token", "dynamic": True}
    return {"format": form, "config_groups": {"group_0": group}}


class CompressedTensors(Method):
    name = "compressed-tensors"
    title = "compressed-tensors"
    needs_checkpoint = True
    rounds_activations = True
    other_names = ("llmcompressor", "llm-compressor")
    formats = (
        Format(
            "compressed-tensors (W4A16)",
            _config("pack-quantized", 4, "int", strategy="group", group_size=128),
        ),
        Format("compressed-tensors (W8A8)", _config("int-quantized", 8, "int", strategy="channel")),
        Format(
            "compressed-tensors (FP8)", _config("float-quantized", 8, "float", strategy="channel")
        ),
    )
    experts = "compressed-tensors (W4A16 in groups)"

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        said = scheme.usual(config)
        found = scheme.mapping(config, "config_groups").values()
        groups = [one for one in found if isinstance(one, dict)]
        weights = [scheme.mapping(one, "weights") for one in groups]
        bits = scheme.most(scheme.number(one, "num_bits") for one in weights)
        one, inputs = next(
            (
                (one, scheme.mapping(group, "input_activations"))
                for group, one in zip(groups, weights, strict=True)
                if scheme.number(one, "num_bits") == bits
            ),
            ({}, {}),
        )
        strategy = scheme.text(one, "strategy")
        group = scheme.integer(one, "group_size") or scheme.side(one, "block_structure")
        activations = None
        if inputs:
            activations = "dynamic" if inputs.get("dynamic") in (True, "local") else "static"
        return said._replace(
            format=scheme.text(config, "format"),
            bits=bits,
            group_size=-1 if strategy == "channel" else group,
            strategy="group" if strategy == "tensor_group" else strategy,
            symmetric=scheme.boolean(one, "symmetric"),
            # Of the orders only these are kept in the checkpoint.
            desc_act=one.get("actorder") in ("group", "dynamic", True),
            activation_bits=scheme.integer(inputs, "num_bits"),
            activations=activations,
            kv_cache=scheme.cache(scheme.mapping(config, "kv_cache_scheme")),
            producer=said.producer or scheme.made_by("compressed-tensors", config.get("version")),
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes | None:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            return None
        weights = next(iter(groups.values())).get("weights") or {}
        bits, group = weights.get("num_bits"), weights.get("group_size")
        if not isinstance(bits, int):
            return None
        if config.get("format") != "pack-quantized":
            bits = 8  # a byte each
        zero_point = 0 if weights.get("symmetric", True) else bits
        return Grouped(bits, group or 0, 16 + zero_point).bytes()

    def check(self, checkpoint: "Checkpoint") -> None:
        packed_weights.check_range(checkpoint)
