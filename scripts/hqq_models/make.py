"""Quantize the demo model with the library hqq, and write down what hqq itself makes of it.

    make.py

writes

* ``test/checkpoints/hqq``: a folder of safetensors, as hqq and transformers save
  a model: 4 bits in groups along rows,
* ``test/checkpoints/hqq-qmodel``: hqq's own format, ``qmodel.pt``: 3 bits in groups across rows,
  packed under the name of floats, with scales and zero points that are quantized too, as older
  versions had them,
* ``python/tests/hqq_cases.safetensors``: small matrices in every number of bits along both axes,
  with what hqq dequantizes them to.

Of both models only the quantized layers are kept, and beside them the SHA-256 of the weights that
hqq dequantizes them to, in float32.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo_model"))

import corpus
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from safetensors.torch import load_file, save_file

CHECKPOINTS = corpus.ROOT / "test" / "checkpoints"
CASES_FILE = corpus.ROOT / "python" / "tests" / "hqq_cases.safetensors"

# Rows, columns and group size; among them groups that end within a row, or go over two.
CASES = ((64, 40, 8), (48, 40, 16), (32, 24, 16), (32, 24, 48), (16, 24, None))
BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)


def quantized(weight: torch.Tensor, old: bool = False, **settings: Any) -> HQQLinear:
    """A layer of hqq's.

    Args:
        old: whether its scales and zero points are quantized, which hqq now only reads
        settings: of ``BaseQuantizeConfig``
    """
    config = BaseQuantizeConfig(**settings, quant_zero=old, quant_scale=old)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.float()
    if not old:
        return HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    layer = HQQLinear(None, config, compute_dtype=torch.float16, device="cpu", initialize=False)
    layer.quant_config.pop("offload_meta", None)
    for name in ("scale_quant_params", "zero_quant_params"):
        # hqq's former default, whose groups were those of the weights.
        layer.quant_config[name]["axis"] = 0
    layer.quantize(linear.weight.data, **layer.quant_config)
    return layer


def weights(layer: HQQLinear) -> torch.Tensor:
    """What hqq dequantizes a layer to, without rounding between the steps."""
    meta = dict(layer.meta)
    for name in ("scale", "zero"):
        if f"{name}_q" in meta:
            # The numbers that they come to are float16, as they are where nothing is quantized.
            own = {k: _float(v) for k, v in meta[f"meta_{name}"].items()}
            own["compute_dtype"] = torch.float32
            meta[name] = Quantizer.dequantize(meta[f"{name}_q"], own).half()
        meta[name] = meta[name].float()
    meta["compute_dtype"] = torch.float32
    return Quantizer.dequantize(layer.W_q, meta)


def _float(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_float else value


def linear_layers() -> dict[str, torch.Tensor]:
    demo = load_file(corpus.MODEL / "model.safetensors")
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in demo.items()
        if name.endswith("_proj.weight")
    }


def digest(layers: dict[str, HQQLinear]) -> dict[str, str]:
    return {
        name: hashlib.sha256(weights(layer).contiguous().numpy().tobytes()).hexdigest()
        for name, layer in layers.items()
    }


def folder(name: str, layers: dict[str, HQQLinear], config: dict[str, Any] | None) -> Path:
    made = CHECKPOINTS / name
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    own = json.loads((corpus.MODEL / "config.json").read_text(encoding="utf-8"))
    if config is not None:
        own["quantization_config"] = config
    write(made / "config.json", own)
    write(made / "weights.json", digest(layers))
    return made


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make_safetensors() -> None:
    layers = {name: quantized(weight) for name, weight in linear_layers().items()}
    quant_config = {**BaseQuantizeConfig(), "scale_quant_params": None, "zero_quant_params": None}
    config = {"quant_method": "hqq", "quant_config": quant_config, "skip_modules": ["lm_head"]}
    made = folder("hqq", layers, config)
    tensors = {
        f"{name}.{key}": value.detach().contiguous()
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
    }
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})


def make_qmodel() -> None:
    settings = {"nbits": 3, "group_size": 64, "axis": 0, "view_as_float": True}
    layers = {
        name: quantized(weight, old=True, **settings) for name, weight in linear_layers().items()
    }
    made = folder("hqq-qmodel", layers, None)
    state = {}
    for name, layer in layers.items():
        layer.encoded_state_dict = False
        state[name] = dict(layer.state_dict())
    torch.save(state, made / "qmodel.pt")


def make_cases() -> None:
    torch.manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for rows, columns, group in CASES:
        for bits in BITS:
            for axis in (0, 1):
                weight = torch.randn(rows, columns) / 20
                layer = quantized(weight, nbits=bits, group_size=group, axis=axis)
                name = f"{rows}-{columns}-{group or 0}-{bits}-{axis}"
                tensors[f"{name}.plain"] = weight
                tensors[f"{name}.W_q"] = layer.W_q.detach()
                tensors[f"{name}.scale"] = layer.meta["scale"]
                tensors[f"{name}.zero"] = layer.meta["zero"]
                tensors[f"{name}.weight"] = weights(layer)
    save_file({k: v.contiguous() for k, v in tensors.items()}, CASES_FILE)


if __name__ == "__main__":
    make_safetensors()
    make_qmodel()
    make_cases()
