"""The demo model in FP8, made with nothing but torch: each variant beside the plain model that
its weights stand for.

``Variant.make`` writes both; what computes with the first must answer like the second.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

DEMO = Path(__file__).resolve().parents[2] / "priv" / "models" / "demo"

# The largest number of float8_e4m3fn.
LARGEST = 448.0

Tensors = dict[str, torch.Tensor]
Parts = tuple[Tensors, torch.Tensor]


class Variant(NamedTuple):
    """A format.

    Args:
        quantization_config: as ``config.json`` has it
        quantize: makes of a weight what is saved (by the end of its name) and what it stands for
    """

    quantization_config: dict[str, Any]
    quantize: Callable[[torch.Tensor], Parts]

    def make(self, folder: Path) -> tuple[Path, Path]:
        """The folders of the quantized and of the plain model."""
        quantized: Tensors = {}
        plain: Tensors = {}
        for name, tensor in load_file(DEMO / "model.safetensors").items():
            if "_proj." not in name:
                quantized[name] = plain[name] = tensor
                continue
            saved, plain[name] = self.quantize(tensor.float())
            for end, value in saved.items():
                quantized[name.removesuffix("weight") + end] = value
        return (
            _save(folder / "quantized", quantized, self.quantization_config),
            _save(folder / "plain", plain, None),
        )


def per_tensor(weight: torch.Tensor) -> Parts:
    scale = weight.abs().max() / LARGEST
    return _parts(weight, scale)


def static(weight: torch.Tensor) -> Parts:
    saved, plain = per_tensor(weight)
    return saved | {"input_scale": torch.tensor(0.05)}, plain


def per_channel(weight: torch.Tensor) -> Parts:
    return _parts(weight, weight.abs().amax(dim=1, keepdim=True) / LARGEST)


def per_block(weight: torch.Tensor) -> Parts:
    rows, columns = (size // 128 for size in weight.shape)
    blocks = weight.view(rows, 128, columns, 128)
    scale = blocks.abs().amax(dim=(1, 3)) / LARGEST
    each = scale.view(rows, 1, columns, 1).expand(blocks.shape).reshape(weight.shape)
    # By DeepGEMM's way of rounding, as vLLM does it.
    eight = (weight * (1.0 / each)).to(torch.float8_e4m3fn)
    return {"weight": eight, "weight_scale_inv": scale}, (eight.float() * each).bfloat16()


# What vLLM holds in one tensor, and gives one scale per tensor when it quantizes by itself.
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


def make_online(folder: Path) -> Path:
    """The plain model of ``online_weights``."""
    return _save(folder, online_weights(DEMO), None)


def online_weights(model: Path) -> Tensors:
    """What the weights of a plain model stand for once vLLM gave each of its tensors a scale."""
    tensors = load_file(model / "model.safetensors")
    largest: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "_proj." in name:
            fused = _fused(name)
            largest[fused] = torch.maximum(
                largest.get(fused, torch.zeros(())), tensor.float().abs().max()
            )
    return {
        name: _parts(tensor.float(), largest[_fused(name)] / LARGEST)[1]
        if "_proj." in name
        else tensor
        for name, tensor in tensors.items()
    }


def _fused(name: str) -> str:
    layer, _, end = name.rpartition("_proj.weight")[0].rpartition(".")
    return f"{layer}.{FUSED.get(end, end)}"


def _parts(weight: torch.Tensor, scale: torch.Tensor) -> Parts:
    eight = (weight / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return {"weight": eight, "weight_scale": scale}, (eight.float() * scale).bfloat16()


def _compressed_tensors(strategy: str, activations: dict[str, Any] | None) -> dict[str, Any]:
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": strategy, "dynamic": False},
        "input_activations": activations and eight | activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


TOKEN = {"strategy": "token", "dynamic": True}

VARIANTS = {
    "per tensor, dynamic": Variant(
        {"quant_method": "fp8", "activation_scheme": "dynamic"}, per_tensor
    ),
    "per tensor, static": Variant({"quant_method": "fp8", "activation_scheme": "static"}, static),
    "per block": Variant(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        per_block,
    ),
    "compressed-tensors, per tensor, static": Variant(
        _compressed_tensors("tensor", {"strategy": "tensor", "dynamic": False}), static
    ),
    "compressed-tensors, per tensor, dynamic": Variant(
        _compressed_tensors("tensor", TOKEN), per_tensor
    ),
    "compressed-tensors, per channel": Variant(_compressed_tensors("channel", TOKEN), per_channel),
    "compressed-tensors, weights only": Variant(_compressed_tensors("channel", None), per_channel),
}


def _save(folder: Path, tensors: Tensors, quantization: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True)
    for file in DEMO.glob("*.j*"):
        shutil.copy(file, folder)
    config = json.loads((DEMO / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
