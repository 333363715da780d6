"""A Llama of half a billion parameters with random weights, in the formats that benchmarks want.

Its layers count, not its embeddings: the vocabulary is the demo model's.
"""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python" / "tests"), str(ROOT / "python")]

import checkpoints  # noqa: E402
import gguf_models  # noqa: E402
import headers  # noqa: E402
import mixtures  # noqa: E402

SIZES = {
    "hidden_size": 1280,
    "intermediate_size": 3584,
    # Fewer try a benchmark out.
    "num_hidden_layers": int(os.environ.get("BENCH_LAYERS", "28")),
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 64,
}

# Formats of safetensors: what quantizes a weight, and what the config says of it. Integers of 4
# bits are in groups of 128.
QUANTIZED = {
    "AWQ": ("awq", {}),
    "W4A16": ("w4a16", {"ignore": ["lm_head"]}),
    "W8A8": ("w8a8", {"ignore": ["lm_head"]}),
}


def make(format: str, folder: Path) -> Path:
    """The model in that folder, which is written if it is not there yet.

    Args:
        format: ``bf16``, one of ``QUANTIZED``, or a type of GGUF files
    """
    is_gguf = format in gguf_models.TYPES
    made = folder / (f"random-{format}.gguf" if is_gguf else f"random-{format}")
    if made.exists():
        return made
    config = {**gguf_models.demo().config, **SIZES}
    torch.manual_seed(1)
    tensors = {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / 50).bfloat16()
        for name, shape in headers.shapes(config).items()
    }
    if is_gguf:
        return gguf_models.write(gguf_models.Model("random", tensors, config), format, folder)
    if format in QUANTIZED:
        variant, settings = QUANTIZED[format]
        _, said, quantize = mixtures.VARIANTS[variant]
        config["quantization_config"] = said | settings
        for name in [name for name in tensors if checkpoints.is_linear(name)]:
            saved, _ = quantize(tensors.pop(name).float())
            module = name.removesuffix("weight")
            tensors |= {module + part: tensor for part, tensor in saved.items()}
    return checkpoints.write(made, tensors, config)
