"""Integers of 4 bits beside bfloat16: a model of 0.5 B parameters with random weights, as it is and
with its layers as AWQ has them, computed by this library's kernel and by vLLM's own.

    PYTHON bench/w4a16.py [ROUNDS]

with the Python of the library's environment (`mix vllm.doctor` names it). The engines are asked in
turns; the figures are medians. It takes 3 GB of memory and of a temporary folder.
"""

import asyncio
import json
import os
import random
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))
os.environ["PYTHONPATH"] = str(ROOT / "python")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm_bridge.engine.engine import GenerateParams  # noqa: E402
from vllm_bridge.engine.start import load  # noqa: E402

DEMO = ROOT / "priv" / "models" / "demo"
OPTIONS = {"enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 2**28}
GROUP = 128

# The shape of Qwen2.5-0.5B.
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 896, 4864, 24, 14, 2, 151_936
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}

# What is measured: how many sequences at once, tokens of each prompt, and new tokens of each.
DECODING = {"1 sequence": (1, 4, 48), "4 sequences": (4, 4, 48), "16 sequences": (16, 4, 32)}
PREFILL = {"prompt of 64": (1, 64, 1), "prompt of 512": (1, 512, 1)}


def write(folder: Path, quantized: bool) -> Path:
    """Makes the model; weights are as large as those of a trained one."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    config = CONFIG | ({"quantization_config": AWQ} if quantized else {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN).bfloat16() * 0.02,
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
    }
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    for number in range(LAYERS):
        prefix = f"model.layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN).bfloat16()
        for name, (rows, columns) in shapes.items():
            if name.split(".")[-1][0] in "qkv":
                tensors[f"{prefix}{name}.bias"] = torch.zeros(rows).bfloat16()
            if not quantized:
                tensors[f"{prefix}{name}.weight"] = torch.randn(rows, columns).bfloat16() * 0.02
                continue
            tensors[f"{prefix}{name}.qweight"] = _words(columns, rows // 8)
            tensors[f"{prefix}{name}.qzeros"] = _words(columns // GROUP, rows // 8)
            scales = torch.full((columns // GROUP, rows), 0.004).half()
            tensors[f"{prefix}{name}.scales"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


async def tokens_per_second(engine: Any, sequences: int, prompt: int, new: int) -> float:
    params = {"max_tokens": new, "ignore_eos": True, "temperature": 0.0, "detokenize": False}

    async def one() -> None:
        # Of its own, so that nothing of it is cached.
        ids = struct.pack(f"<{prompt}I", *random.choices(range(100, 4000), k=prompt))
        asked = GenerateParams({"prompt_token_ids": ids}, params)
        await engine.generate(str(random.random()), asked)

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(sequences)))
    tokens = new if new > 1 else prompt
    return sequences * tokens / (time.perf_counter() - started)


async def main(rounds: int, folder: Path) -> None:
    plain, awq = write(folder / "bf16", False), write(folder / "awq", True)
    engines = {}
    for name, model, disabled in (
        ("bf16", plain, ""),
        ("awq", awq, ""),
        ("awq, vLLM's kernel", awq, "PackedLinearKernel"),
    ):
        os.environ["VLLM_DISABLED_KERNELS"] = disabled
        engines[name] = await load(str(model), OPTIONS)
        print(name, engines[name].info()["quantization_kernel"], flush=True)
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds + 1):
        for task, sizes in (DECODING | PREFILL).items():
            for name, engine in engines.items():
                rate = await tokens_per_second(engine, *sizes)
                if number:  # the first round warms up
                    rates[task][name].append(rate)
    print(f"| | {' | '.join(engines)} | awq / bf16 | awq / vLLM's |")
    print("| --- |" + " --- |" * (len(engines) + 2))
    for task, each in rates.items():
        bf16, ours, theirs = medians = [statistics.median(each[name]) for name in engines]
        figures = " | ".join(f"{rate:.1f}" for rate in medians)
        print(f"| {task} | {figures} | {ours / bf16:.2f} | {ours / theirs:.2f} |")
    for engine in engines.values():
        engine._llm.shutdown()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, Path(made)))
