"""A small mixture of experts, quantized in every format that experts come in, each beside the plain
model that its weights stand for.

It knows what the demo model knows, because its experts are the demo model's, each changed a
little at random from a seed; two of the four compute each token. What packs the weights here, and
what the packed ones stand for, is plain torch, or the library of the format.

    python mixtures.py NAME FOLDER

writes the models of one format.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

import fp8_models
from fp8_models import DEMO, Parts, Tensors

EXPERTS, CHOSEN = 4, 2
GROUP = 128

# How far an expert is from the demo model's layer, relative to its weights; and how far the
# router's weights are from zero: so far that two experts are clearly the best of most tokens.
DIFFERENCE, CLARITY = 0.1, 0.2

Quantize = Callable[[torch.Tensor], Parts]

# What the parts of an expert are called: by Mixtral, and by the demo model and most others.
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def mixtral(width: int | None = None) -> tuple[Tensors, dict[str, Any]]:
    """A mixture in bf16, and its config.

    Args:
        width: of its experts, of which the last ones are left out; None for that of the demo model
    """
    config = _config()
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "sliding_window": None,
        "intermediate_size": width or config["intermediate_size"],
    }
    return _mixture("block_sparse_moe", MIXTRAL, width), config


def qwen() -> tuple[Tensors, dict[str, Any]]:
    """The same with an expert that computes every token beside those that are chosen, and names
    that most have."""
    config = _config()
    config |= {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "norm_topk_prob": True,
        "moe_intermediate_size": config["intermediate_size"],
        "shared_expert_intermediate_size": config["intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "qkv_bias": True,
    }
    tensors = _mixture("mlp", {}, share=0.5)
    for name, tensor in load_file(DEMO / "model.safetensors").items():
        layer, _, part = name.partition(".mlp.")
        if part:
            tensors[f"{layer}.mlp.shared_expert.{part}"] = tensor
            # The sigmoid of nothing is a half.
            gate = torch.zeros(1, config["hidden_size"], dtype=torch.bfloat16)
            tensors[f"{layer}.mlp.shared_expert_gate.weight"] = gate
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = torch.zeros(len(tensor), dtype=torch.bfloat16)
            tensors[name.removesuffix("weight") + "bias"] = bias
    return tensors, config


def _config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    return config


def _mixture(
    block: str, names: Mapping[str, str], width: int | None = None, share: float = 1.0
) -> Tensors:
    """The demo model with experts in the place of its MLPs.

    Args:
        share: of what the demo model's layers say
    """
    torch.manual_seed(11)
    tensors: Tensors = {}
    for name, tensor in load_file(DEMO / "model.safetensors").items():
        layer, found, part = name.partition(".mlp.")
        if not found:
            tensors[name] = tensor
            continue
        part = part.removesuffix(".weight")
        tensor = tensor[:, :width] if part == "down_proj" else tensor[:width]
        for expert in range(EXPERTS):
            changed = tensor.float() * (share if part == "down_proj" else 1.0)
            changed += DIFFERENCE * changed.std() * torch.randn(tensor.shape)
            prefix = f"{layer}.{block}.experts.{expert}.{names.get(part, part)}"
            tensors[f"{prefix}.weight"] = changed.bfloat16()
        gate = CLARITY * torch.randn(EXPERTS, tensors["lm_head.weight"].shape[1])
        tensors.setdefault(f"{layer}.{block}.gate.weight", gate.bfloat16())
    return tensors


class Made(NamedTuple):
    """The folders of a mixture in one format.

    Args:
        quantized: what is loaded
        plain: what its weights stand for, in bf16
        original: what was quantized
    """

    quantized: Path
    plain: Path
    original: Path


def make(name: str, folder: Path) -> Made:
    base, settings, quantize = VARIANTS[name]
    original, config = base()
    quantized: Tensors = {}
    plain: Tensors = {}
    for key, tensor in original.items():
        if not is_quantized(key, settings):
            quantized[key] = plain[key] = tensor
            continue
        saved, plain[key] = quantize(tensor.float())
        for end, value in saved.items():
            quantized[key.removesuffix("weight") + end] = value
    return Made(
        write(folder / "quantized", quantized, config | {"quantization_config": settings}),
        write(folder / "plain", plain, config),
        write(folder / "original", original, config),
    )


def make_online(folder: Path) -> Made:
    """The mixture itself, to be quantized to FP8 while it is loaded: vLLM gives a scale to each of
    its tensors, which hold queries, keys and values, and an expert's gate and up, together."""
    original, config = mixtral()
    together = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "w1": "w13", "w3": "w13"}
    largest: dict[str, torch.Tensor] = {}

    def tensor_of(name: str) -> str:
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        return f"{layer}.{together.get(part, part)}"

    quantized = {name: tensor for name, tensor in original.items() if is_quantized(name, {})}
    for name, tensor in quantized.items():
        before = largest.get(tensor_of(name), torch.zeros(()))
        largest[tensor_of(name)] = torch.maximum(before, tensor.float().abs().max())
    plain = dict(original)
    for name, tensor in quantized.items():
        scale = largest[tensor_of(name)] / fp8_models.LARGEST
        plain[name] = ((tensor.float() / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16()
    folders = write(folder / "original", original, config), write(folder / "plain", plain, config)
    return Made(folders[0], folders[1], folders[0])


def is_quantized(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a weight is one of attention or of an expert, and not left out."""
    left_out = any("self_attn" in pattern for pattern in settings.get("ignore", ()))
    if ".self_attn." in name:
        return name.endswith("_proj.weight") and not left_out
    return name.endswith("_proj.weight") or ".experts." in name


def write(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for file in DEMO.glob("*.j*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# Formats of 4 bits: what is saved of a weight, and what it stands for.


def _symmetric(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers of -8 to 7, and a scale per row and group, in numbers that bf16 and float16 have."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = (groups.abs().amax(2) / 7).bfloat16().float()
    integers = (groups / scale[..., None]).round().clamp(-8, 7)
    return integers.reshape(weight.shape), scale


def _asymmetric(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers of 0 to 15, what stands for zero, and a scale."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (-low / scale).round().clamp(0, 15)
    integers = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    return integers.reshape(weight.shape), zero, scale


def _stands_for(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (integers * scale.repeat_interleave(GROUP, dim=1)).bfloat16()


def _words(numbers: torch.Tensor) -> torch.Tensor:
    """Eight numbers of a row in each integer of 32 bits, the first in its lowest bits."""
    eights = numbers.to(torch.int64).reshape(len(numbers), -1, 8)
    words = (eights << torch.arange(0, 32, 4)).sum(2)
    return words.to(torch.uint32).view(torch.int32)


def gptq(weight: torch.Tensor) -> Parts:
    integers, scale = _symmetric(weight)
    columns = weight.shape[1]
    saved = {
        # Each integer holds eight inputs of an output.
        "qweight": _words(integers + 8).T,
        # Zero points are stored less one.
        "qzeros": torch.full((columns // GROUP, len(weight) // 8), 0x77777777, dtype=torch.int32),
        "scales": scale.T.half(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // GROUP,
    }
    return saved, _stands_for(integers, scale)


def gptq_ordered(weight: torch.Tensor) -> Parts:
    """With zero points, stored as they are, and the inputs of a group anywhere (``desc_act``)."""
    rows, columns = weight.shape
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(rows))
    integers, zero, scale = _asymmetric(weight[:, order])
    plain = _stands_for(integers - zero.repeat_interleave(GROUP, dim=1), scale)
    back = order.argsort()
    saved = {
        "qweight": _words(integers[:, back]).T,
        "qzeros": _words(zero.T),
        "scales": scale.T.half(),
        "g_idx": (back // GROUP).int(),
    }
    return saved, plain[:, back]


def awq(weight: torch.Tensor) -> Parts:
    integers, zero, scale = _asymmetric(weight)

    def outputs(numbers: torch.Tensor) -> torch.Tensor:
        # A row per input, and eight outputs in an integer, those of even places first.
        eights = numbers.T.reshape(numbers.shape[1], -1, 8)
        return _words(eights[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1))

    saved = {"qweight": outputs(integers), "qzeros": outputs(zero), "scales": scale.T.half()}
    return saved, _stands_for(integers - zero.repeat_interleave(GROUP, dim=1), scale)


def w4a16(weight: torch.Tensor) -> Parts:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    integers, scale = _symmetric(weight)
    saved = {
        "weight_packed": pack_to_int32(integers.to(torch.int8), 4),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return saved, _stands_for(integers, scale)


def w4a16_asymmetric(weight: torch.Tensor) -> Parts:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    integers, zero, scale = _asymmetric(weight)
    saved = {
        "weight_packed": pack_to_int32((integers - 8).to(torch.int8), 4),
        "weight_zero_point": pack_to_int32((zero - 8).to(torch.int8), 4, packed_dim=0),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return saved, _stands_for(integers - zero.repeat_interleave(GROUP, dim=1), scale)


def w8a8(weight: torch.Tensor) -> Parts:
    scale = weight.abs().amax(1, keepdim=True) / 127
    integers = (weight / scale).round().clamp(-127, 127)
    saved = {"weight": integers.to(torch.int8), "weight_scale": scale}
    return saved, (integers * scale).bfloat16()


def nf4(weight: torch.Tensor) -> Parts:
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, dequantize_4bit

    layer: Any = bnb.nn.Linear4bit(weight.shape[1], len(weight), bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        weight.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    saved = layer.to("cpu").state_dict()  # which quantizes it
    state = QuantState.from_dict(
        {name: part for name, part in saved.items() if name != "weight"},
        device=torch.device("cpu"),
    )
    return dict(saved), dequantize_4bit(saved["weight"], state).bfloat16()


_UNTOUCHED = ["lm_head", "re:.*gate$"]


def _compressed_tensors(bits: int, form: str, activations: Any = None, **weights: Any) -> Any:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False} | weights,
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": _UNTOUCHED,
        "config_groups": {"group_0": group},
    }


def _fp8(name: str) -> tuple[Any, Any, Quantize]:
    settings, quantize = fp8_models.VARIANTS[name]
    if "ignore" in settings:
        settings = settings | {"ignore": _UNTOUCHED}
    return mixtral, settings, quantize


_GROUPS: dict[str, Any] = {"strategy": "group", "group_size": GROUP}
_BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_GPTQ = {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}

VARIANTS: Mapping[str, tuple[Callable[[], tuple[Tensors, dict[str, Any]]], Any, Quantize]] = {
    "fp8-tensor": _fp8("per tensor, dynamic"),
    "fp8-narrow": (lambda: mixtral(500), *_fp8("per tensor, static")[1:]),
    "fp8-qwen": (qwen, *_fp8("per block")[1:]),
    "fp8-channel": _fp8("compressed-tensors, per channel"),
    "awq": (
        mixtral,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
        awq,
    ),
    "gptq": (mixtral, {"quant_method": "gptq"} | _GPTQ, gptq),
    "gptq-act": (
        mixtral,
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}
        | _GPTQ
        | {"sym": False, "desc_act": True},
        gptq_ordered,
    ),
    "auto-round": (
        mixtral,
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"} | _GPTQ,
        gptq,
    ),
    "w4a16": (mixtral, _compressed_tensors(4, "pack-quantized", **_GROUPS), w4a16),
    "w4a16-asym": (
        mixtral,
        _compressed_tensors(4, "pack-quantized", symmetric=False, **_GROUPS),
        w4a16_asymmetric,
    ),
    "w8a8": (
        mixtral,
        # Of attention, activations would be rounded as well.
        _compressed_tensors(8, "int-quantized", _BY_TOKEN, strategy="channel")
        | {"ignore": [*_UNTOUCHED, "re:.*self_attn.*"]},
        w8a8,
    ),
    "nf4": (
        mixtral,
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head", "gate"],
        },
        nf4,
    ),
}


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
