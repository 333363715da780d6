"""Writes the tables of guides/quantization.md from what python/tests/matrix.py measures.

    PYTHON bench/quantization.py [RESULTS]

with the Python of the library's environment (`mix vllm.doctor` names it) runs every variant, which
takes twenty minutes on two cores, or takes the lines of an earlier run from the file RESULTS.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "guides" / "quantization.md"
MATRIX = ROOT / "python" / "tests" / "matrix.py"
TABLE, GGUF_TABLE = (
    (f"<!-- {name}: written by bench/quantization.py -->", f"<!-- end of {name} -->")
    for name in ("table", "table of GGUF")
)

# What each is called for readers, and the method whose class says on which GPUs it runs.
ROWS = {
    "bf16": ("not quantized", None),
    "demo-awq": ("AWQ, 4 bits", "awq"),
    "demo-gptq": ("GPTQ, 4 bits, symmetric", "gptq"),
    # On processors without AMX.
    "awq-rounded": ('AWQ, 4 bits, `activations: "int8"`', "awq"),
    "gptq-rounded": ('GPTQ, 4 bits, symmetric, `activations: "int8"`', "gptq"),
    "gptq-w2": ("GPTQ, 2 bits in groups of 32, asymmetric", "gptq"),
    "gptq-w3": ("GPTQ, 3 bits, symmetric", "gptq"),
    "gptq-w4-act": ("GPTQ, 4 bits, symmetric, `desc_act`", "gptq"),
    "gptq-w4-asym-act": ("GPTQ, 4 bits, asymmetric, `desc_act`", "gptq"),
    "gptq-w8": ("GPTQ, 8 bits, symmetric", "gptq"),
    "auto-round": ("auto-round, 4 bits", "inc"),
    "auto-round-w3": ("auto-round, 3 bits", "inc"),
    "w4a16": ("compressed-tensors W4A16", "compressed-tensors"),
    "w4a16-asym": ("compressed-tensors W4A16, zero points", "compressed-tensors"),
    "w8a16": ("compressed-tensors W8A16", "compressed-tensors"),
    "w8a8": ("compressed-tensors W8A8 INT8", "compressed-tensors"),
    "fp8-dynamic": ("compressed-tensors FP8 per channel", "compressed-tensors"),
    "fp8-static": ("compressed-tensors FP8 per tensor", "compressed-tensors"),
    "fp8-tensor": ("FP8 per tensor", "fp8"),
    "fp8-block": ("FP8 per block", "fp8"),
    "fp8-online": ('`quantization: "fp8"` on a plain model', "fp8"),
    "torchao-int8": ('torchao INT8 weights, online (`dtype: "int8"`)', "torchao"),
    "torchao-int8-dynamic": ("torchao INT8 weights and activations, online", "torchao"),
    "torchao-fp8": ("torchao FP8 weights, online", "torchao"),
    "bnb-nf4": ("bitsandbytes NF4", "bitsandbytes"),
    "bnb-fp4": ("bitsandbytes FP4", "bitsandbytes"),
    "bnb-nf4-double": ("bitsandbytes NF4, scales quantized too", "bitsandbytes"),
    "bnb-int8": ("bitsandbytes INT8", "bitsandbytes"),
    "bnb-online": ('bitsandbytes NF4, online (`dtype: "int4"`)', "bitsandbytes"),
    "hqq": ("HQQ, 4 bits in groups of 64", "hqq"),
    "hqq-qmodel": ("HQQ, 3 bits across rows, scales quantized too (`qmodel.pt`)", "hqq"),
    "hqq-online": ('HQQ, online (`quantization: "hqq"`)', "hqq"),
    "squeezellm": ("SqueezeLLM, 4 bits", "squeezellm"),
    "squeezellm-sparse": ("SqueezeLLM, 3 bits, dense-and-sparse", "squeezellm"),
    "experts-fp8-tensor": ("experts, FP8 per tensor", "fp8"),
    "experts-fp8-qwen": ("experts, FP8 per block", "fp8"),
    "experts-fp8-channel": ("experts, compressed-tensors FP8 per channel", "compressed-tensors"),
    "experts-fp8-online": ('experts, `quantization: "fp8"` on a plain model', "fp8"),
    "experts-awq": ("experts, AWQ, 4 bits", "awq"),
    "experts-gptq": ("experts, GPTQ, 4 bits, symmetric", "gptq"),
    "experts-gptq-act": ("experts, GPTQ, 4 bits, asymmetric, `desc_act`", "gptq"),
    "experts-auto-round": ("experts, auto-round, 4 bits", "inc"),
    "experts-w4a16": ("experts, compressed-tensors W4A16", "compressed-tensors"),
    "experts-w4a16-asym": ("experts, compressed-tensors W4A16, zero points", "compressed-tensors"),
    "experts-w8a8": ("experts, compressed-tensors W8A8 INT8", "compressed-tensors"),
    "experts-nf4": ("experts, bitsandbytes NF4", "bitsandbytes"),
    "kv-fp8": ('`kv_cache_dtype: "fp8"` (the same as `"fp8_e4m3"`)', None),
    "kv-fp8_e5m2": ('`kv_cache_dtype: "fp8_e5m2"`', None),
}
HEAD = (
    "variant | sentences right | largest | mean | KL | KL to bf16 "
    "| MB on disk | in memory | loaded in | speed | GPU (CUDA capability)"
)

# GGUF files, and what each is called for readers.
GGUF_ROWS = {
    **{
        f"gguf-{type}": f"`{type}`"
        for type in (
            *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1"),
            *("Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q2_K"),
        )
    },
    "gguf-mixture-Q8_0": "experts, `Q8_0`",
    "gguf-mixture-Q4_K_M": "experts, `Q4_K_M`",
}
GGUF_HEAD = (
    "file | sentences right | largest | mean | KL | largest to llama.cpp | mean to llama.cpp "
    "| KL to bf16 | MB on disk | in memory | loaded in | speed"
)


def measured() -> dict[str, dict[str, Any]]:
    if len(sys.argv) > 1:
        return read(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        environment = os.environ | {"MATRIX_SPEED": "1"}
        subprocess.run(
            [sys.executable, MATRIX, results, *ROWS, *GGUF_ROWS], env=environment, check=True
        )
        return read(results)


def read(results: Path) -> dict[str, dict[str, Any]]:
    lines = results.read_text(encoding="utf-8").splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


def capability(method: str | None) -> str:
    """The least that vLLM's class of the method asks of a CUDA device."""
    if method is None:
        return ""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    least = get_quantization_config(method).get_min_capability()
    return f"{least // 10}.{least % 10}" if least > 0 else "any"


def row(name: str, result: dict[str, Any]) -> str:
    title, method = ROWS[name]
    if "error" in result:
        return f"| {title} | does not run here ||||||||| {capability(method)} |"
    cells = [
        title + (" ¹" if "computed in" in (result["note"] or "") else ""),
        *exactness(result),
        *cost(result),
        capability(method),
    ]
    return "| " + " | ".join(cells) + " |"


def gguf_row(name: str, result: dict[str, Any]) -> str:
    title = GGUF_ROWS[name]
    if "error" in result:
        return f"| {title} | does not run here ||||||||||| "
    said = result["llama_cpp"]
    cells = [
        title,
        *exactness(result),
        f"{said['max']:.4f}",
        f"{said['mean']:.5f}",
        *cost(result),
    ]
    return "| " + " | ".join(cells) + " |"


def exactness(result: dict[str, Any]) -> list[str]:
    reference = result["reference"]
    return [
        f"{82 - len(result['wrong'])} of 82",
        f"{reference['max']:.4f}",
        f"{reference['mean']:.5f}",
        f"{abs(reference['kl']):.5f}",
    ]


def cost(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['bf16']['kl']:.5f}",
        f"{result['disk_bytes'] / 1e6:.1f}",
        f"{(result['weight']['linear'] + result['weight']['others']) / 1e6:.1f}",
        f"{result['load_seconds']:.1f} s",
        speed(result),
    ]


def speed(result: dict[str, Any]) -> str:
    """Relative to the model in bf16, of a run that has measured it (``MATRIX_SPEED``); experts that
    were dequantized are computed as those of a plain mixture."""
    if not result["bf16_tokens_per_second"] or "Quantized experts" in (result["note"] or ""):
        return ""
    return f"{result['tokens_per_second'] / result['bf16_tokens_per_second']:.2f}"


def main() -> None:
    results = measured()
    text = GUIDE.read_text(encoding="utf-8")
    text = replaced(
        text, TABLE, HEAD, [row(name, results[name]) for name in ROWS if name in results]
    )
    text = replaced(
        text,
        GGUF_TABLE,
        GGUF_HEAD,
        [gguf_row(name, results[name]) for name in GGUF_ROWS if name in results],
    )
    GUIDE.write_text(text, encoding="utf-8")


def replaced(text: str, marks: tuple[str, str], head: str, rows: list[str]) -> str:
    """The text with another table between two marks; as it is where there are no rows."""
    if not rows:
        return text
    begin, end = marks
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    table = [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *rows]
    return f"{before}{begin}\n{chr(10).join(table)}\n{end}{after}"


if __name__ == "__main__":
    main()
