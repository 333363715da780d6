"""What engines really take beside what is estimated, of quantized variants and of families whose KV
cache has a form of its own.

    python sizes.py RESULTS [NAME...]

loads one model after another and appends a line of JSON for each to the file RESULTS.
"""

import asyncio
import dataclasses
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix  # before torch, which reads variables that it sets

# isort: split
import torch

import checkpoints
import gguf_models
import mixtures
import tiny_models
import weighing
from vllm_bridge import quantization
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.quantization import online
from vllm_bridge.sizing import activations, adapters, kv_cache, weights


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to load.

    Args:
        name: for readers
        make: writes it into a folder
        options: engine options
    """

    name: str
    make: Callable[[Path], Path]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _demo(name: str) -> Callable[[Path], Path]:
    return lambda folder: checkpoints.make(name, folder / name)


def _gguf(type: str) -> Callable[[Path], Path]:
    return lambda folder: gguf_models.write(gguf_models.demo(), type, folder)


def _mixture(name: str) -> Callable[[Path], Path]:
    return lambda folder: mixtures.make(name, folder).quantized


def _tiny(name: str) -> Callable[[Path], Path]:
    return lambda folder: tiny_models.make(name, folder)


CASES = {
    "bf16": Case("plain, bf16", _demo("demo")),
    "awq": Case("AWQ, 4 bits", _demo("demo-awq")),
    "gptq": Case("GPTQ, 4 bits", _demo("demo-gptq")),
    "nf4": Case("bitsandbytes NF4", _demo("bnb-nf4")),
    "Q8_0": Case("GGUF Q8_0", _gguf("Q8_0")),
    "Q4_K_M": Case("GGUF Q4_K_M", _gguf("Q4_K_M")),
    "w8a8": Case("compressed-tensors W8A8", _demo("w8a8")),
    "int8": Case('plain, `dtype: "int8"`', _demo("demo"), {"dtype": "int8"}),
    "kv-fp8": Case('plain, `kv_cache_dtype: "fp8"`', _demo("demo"), {"kv_cache_dtype": "fp8"}),
    "kv-float32": Case('plain, `dtype: "float32"`', _demo("demo"), {"dtype": "float32"}),
    "lora": Case(
        "plain, with room for four adapters",
        _demo("demo"),
        {"enable_lora": True, "max_loras": 4, "max_lora_rank": 32},
    ),
    "experts": Case("experts, W4A16", _mixture("w4a16")),
    "mistral": Case("Mistral: a window", _tiny("mistral")),
    "gemma2": Case("Gemma 2: every other layer a window", _tiny("gemma2")),
    "gemma3_text": Case("Gemma 3: five windows of six layers", _tiny("gemma3_text")),
    "gemma4_text": Case("Gemma 4: larger heads without a window", _tiny("gemma4_text")),
    "gpt_oss": Case("gpt-oss, bf16: windows, experts", _tiny("gpt_oss")),
    "llama4_text": Case("Llama 4: chunks, experts", _tiny("llama4_text")),
    "cohere2": Case("Command R7B: three windows of four layers", _tiny("cohere2")),
    "falcon": Case("Falcon: one head of keys and values", _tiny("falcon")),
    "deepseek_v2": Case("DeepSeek V2: latent attention, experts", _tiny("deepseek_v2")),
    "lfm2": Case("LFM 2: short convolutions", _tiny("lfm2")),
    "falcon_h1": Case("Falcon H1: Mamba beside attention", _tiny("falcon_h1")),
    "granitemoehybrid": Case("Granite 4: Mamba in three of four layers", _tiny("granitemoehybrid")),
    "zamba2": Case("Zamba 2: attention that layers share beside Mamba", _tiny("zamba2")),
    "nemotron_h": Case("Nemotron H: Mamba, in float32", _tiny("nemotron_h")),
    "qwen3_next": Case("Qwen 3 Next: delta networks", _tiny("qwen3_next")),
}


def install() -> None:
    """Has the workers of engines tell how large their caches are."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    weighing.install()
    CPUWorker.get_cache_bytes = lambda self: sum(
        tensor.untyped_storage().nbytes()
        for tensor in {
            one.untyped_storage().data_ptr(): one
            for layer in self.vllm_config.compilation_config.static_forward_context.values()
            for one in _tensors(getattr(layer, "kv_cache", ()))
        }.values()
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.numel() else []
    return [one for part in value for one in _tensors(part)]


async def measure(case: Case, folder: Path) -> dict[str, Any]:
    model = case.make(folder)
    async with matrix.session(model, **case.options) as asked:
        weight = await asked.weight()
        (cache,) = await asked._engine._llm.collective_rpc("get_cache_bytes")
        tokens = asked.info["kv_cache_tokens"]
    options = matrix.OPTIONS | case.options
    online.take_dtype(options)
    checkpoint = quantization.as_loaded(check_model(str(model), options))
    estimated = kv_cache.of(checkpoint.config, options, "cpu")
    memory = options["kv_cache_memory_bytes"]
    return {
        "weights": weight["linear"] + weight["others"],
        "estimated_weights": weights.weights(checkpoint, options, "cpu").memory
        + activations.rotary_table(checkpoint.config, options)
        + adapters.bytes_per_rank(checkpoint.config, options),
        "cache": cache,
        "estimated_cache": memory // estimated.bytes_per_block * estimated.bytes_per_block,
        "tokens": tokens,
        "estimated_tokens": estimated.tokens(memory, options["max_model_len"]),
    }


async def main(results: Path, names: list[str]) -> None:
    matrix._fork()
    install()
    with tempfile.TemporaryDirectory() as temporary:
        tempfile.tempdir = temporary
        for name in names or CASES:
            try:
                folder = Path(tempfile.mkdtemp())
                async with asyncio.timeout(matrix.TIMEOUT):
                    line = await measure(CASES[name], folder)
            except Exception as error:
                traceback.print_exc()
                line = {"error": str(error)}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name} | line) + "\n")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
