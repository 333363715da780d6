"""Holds what `VLLM.Job.estimate` foresees against what jobs took: disk, memory and time.

    PYTHON bench/job_sizes.py [RESULTS]

with the Python of the library's environment (`mix vllm.doctor` names it), in an environment that
quantizes as well (`mix vllm.setup --with quantize`). It makes Llamas of 61 and 522 million
parameters with random weights, and outputs of them and of the demo model, each in a process of its
own, which takes a quarter of an hour on two cores; or it takes the lines of an earlier run from the
file RESULTS. Prints a table.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "python" / "tests")]

from producing import DEMO, interpreter, produce  # noqa: E402
from vllm_bridge.jobs import estimate  # noqa: E402

# Models by the sizes of their Llama: hidden size, layers, intermediate size.
SIZES = {"61 M": (1024, 5, 2816), "522 M": (1536, 20, 4096)}

OUTPUTS: list[tuple[str, Any]] = [
    ("gguf", "Q4_K_M"), ("gguf", "Q8_0"), ("bitsandbytes", "nf4"), ("bitsandbytes", "int8"),
    ("hqq", "4bit"), ("torchao", "int8"), ("compressed-tensors", "FP8_DYNAMIC"),
    ("compressed-tensors", "W4A16"), ("gptq", "4bit"), ("awq", "4bit"),
]  # fmt: skip

# With these it takes minutes for each of the larger models.
SLOW = {"522 M": {"gptq", "awq"}}

TEXTS = [f"The {number}th of many sentences, {'and some more words ' * 12}" for number in range(16)]

# Run in the environment that quantizes, which has no vLLM in its way.
MAKE = """
import shutil, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
demo, out, hidden, layers, inner = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.manual_seed(0)
config = LlamaConfig.from_pretrained(demo)
config.update(dict(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner,
    num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64))
shutil.copytree(demo, out, ignore=shutil.ignore_patterns("*.safetensors"))
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
"""


def measure(folder: Path, results: Path) -> None:
    models = {"4 M": DEMO}
    for name, size in SIZES.items():
        models[name] = folder / name.replace(" ", "")
        python = interpreter()
        if python is None:
            sys.exit("run mix vllm.setup --with quantize")
        arguments = [python, "-c", MAKE, DEMO, models[name], *map(str, size)]
        subprocess.run(arguments, check=True, capture_output=True)
    for name, path in models.items():
        for form, options in OUTPUTS:
            if form in SLOW.get(name, ()):
                continue
            where = folder / f"{name}-{form}-{options}".replace(" ", "")
            texts = {"calibration": {"texts": TEXTS}} if form in ("gptq", "awq") else {}
            if options == "W4A16":
                texts = {"calibration": {"texts": TEXTS}}
            (told,) = produce([(form, options)], where, path, **texts).values()
            row = {"model": name, "path": str(path), **told}
            tokens = (told.get("calibration") or {}).get("tokens") or 0
            asked = [(form, told.get("options") or {})]
            (seen,) = estimate.outputs(str(path), {}, asked, tokens)
            row |= {"estimated": seen.to_wire()}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | output | disk | foreseen | peak of memory | foreseen | seconds | foreseen |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        seen = row["estimated"]
        size, peak = row["bytes"], row["peak_memory_bytes"]
        fast, slow = (60 * minutes for minutes in seen["minutes"])
        lines.append(
            f"| {row['model']} | {row['label']} | {size / 1e6:.2f} MB "
            f"| {seen['bytes'] / size - 1:+.1%} | {peak / 2**20:.0f} MiB "
            f"| {seen['memory'] / peak - 1:+.0%} "
            f"| {row['seconds']:.0f} | {fast:.0f} to {slow:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "results.jsonl"
        if not results.exists():
            measure(Path(folder), results)
        print(table([json.loads(line) for line in results.read_text().splitlines()]))


if __name__ == "__main__":
    main()
