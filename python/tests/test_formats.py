"""What plain models would take in other formats."""

from pathlib import Path
from typing import Any

import pytest

import checkpoints
import gguf_models
import headers
from headers import LLAMA_2, LLAMA_3_8B, MIXTRAL
from vllm_bridge.checkpoints import gguf
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.quantization import registry
from vllm_bridge.sizing.formats import InFormat, in_formats
from vllm_bridge.sizing.gguf_types import FILES

GB = 10**9
DEMO = str(checkpoints.DEMO)


def by_name(checkpoint: Checkpoint) -> dict[str, InFormat]:
    return {one.name: one for one in in_formats(checkpoint)}


# What everybody knows: 4, 2, 1 and half a byte for each of 7, 13 and 70 billion weights.
@pytest.mark.parametrize(
    ("size", "single", "half", "eight", "four"),
    [
        ("7B", 28, 14, 7, (3.5, 4.0)),
        ("13B", 52, 26, 13, (6.5, 7.5)),
        ("70B", 280, 140, 70, (35, 40)),
    ],
)
def test_the_well_known_table(
    size: str, single: float, half: float, eight: float, four: tuple[float, float]
) -> None:
    found = by_name(headers.plain(LLAMA_2[size]))
    # 7B has 6.74 billion weights, and 70B 68.98.
    assert found["float32"].memory / GB == pytest.approx(single, rel=0.05)
    assert found["float16"].memory / GB == pytest.approx(half, rel=0.05)
    for name in ("bitsandbytes (8 bits)", "compressed-tensors (W8A8)", "gptq (8 bits)"):
        assert found[name].memory / GB == pytest.approx(eight, rel=0.05)
    for name in ("awq (4 bits)", "gptq (4 bits)", "compressed-tensors (W4A16)", "Q4_0"):
        assert four[0] < found[name].memory / GB < four[1]


# In GB, as the repositories TheBloke/Llama-2-*-GGUF, TheBloke/Mixtral-8x7B-v0.1-GGUF and
# bartowski/Meta-Llama-3.1-8B-Instruct-GGUF say of their files.
PUBLISHED: list[tuple[dict[str, Any], dict[str, float]]] = [
    (
        LLAMA_2["7B"],
        {
            "Q3_K_S": 2.95, "Q3_K_M": 3.30, "Q3_K_L": 3.60, "Q4_0": 3.83, "Q4_K_S": 3.86,
            "Q4_K_M": 4.08, "Q5_0": 4.65, "Q5_K_S": 4.65, "Q5_K_M": 4.78, "Q6_K": 5.53,
            "Q8_0": 7.16,
        },
    ),
    (
        LLAMA_2["13B"],
        {
            "Q3_K_S": 5.66, "Q3_K_M": 6.34, "Q3_K_L": 6.93, "Q4_0": 7.37, "Q4_K_S": 7.41,
            "Q4_K_M": 7.87, "Q5_0": 8.97, "Q5_K_S": 8.97, "Q5_K_M": 9.23, "Q6_K": 10.68,
            "Q8_0": 13.83,
        },
    ),
    (
        LLAMA_2["70B"],
        {
            "Q3_K_S": 29.92, "Q3_K_M": 33.19, "Q3_K_L": 36.15, "Q4_0": 38.87, "Q4_K_S": 39.07,
            "Q4_K_M": 41.42, "Q5_0": 47.46, "Q5_K_S": 47.46, "Q5_K_M": 48.75, "Q6_K": 56.59,
            "Q8_0": 73.29,
        },
    ),
    (
        LLAMA_3_8B,
        {
            "Q2_K": 3.18, "Q3_K_S": 3.66, "Q3_K_M": 4.02, "Q3_K_L": 4.32, "Q4_K_S": 4.69,
            "Q4_K_M": 4.92, "Q5_K_S": 5.60, "Q5_K_M": 5.73, "Q6_K": 6.60, "Q8_0": 8.54,
            "F32": 32.13,
        },
    ),
    (MIXTRAL, {"Q6_K": 38.38, "Q8_0": 49.62}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "sizes"), PUBLISHED)
def test_gguf_files_are_as_large_as_published_ones(
    config: dict[str, Any], sizes: dict[str, float]
) -> None:
    found = by_name(headers.plain(config))
    for name, size in sizes.items():
        assert found[name].disk / GB == pytest.approx(size, rel=0.005), name


@pytest.mark.parametrize("model", [gguf_models.demo, gguf_models.qwen2, gguf_models.mixture])
def test_each_tensor_of_a_gguf_file_has_the_type_that_llama_cpp_chooses(
    tmp_path: Path, model: Any
) -> None:
    source = model()
    folder = checkpoints.write(tmp_path / "plain", source.tensors, source.config)
    found = by_name(check_model(str(folder), {}))
    converted = list(gguf_models._converted(source))
    for type in gguf_models.TYPES:
        size = 0
        for name, tensor in converted:
            kind = gguf.TYPES[gguf_models._type(name, tensor, type, source).name]
            size += tensor.size // kind.block * kind.size
        assert found[type].disk - 50 * source.config["vocab_size"] == size, type


def test_a_gguf_file_is_a_little_larger_than_its_tensors(tmp_path: Path) -> None:
    file = gguf_models.make("F16", tmp_path)
    found = by_name(check_model(DEMO, {}))["F16"]
    assert found.disk == pytest.approx(file.stat().st_size, rel=0.01)


# Checkpoints of the demo model, by their formats.
MADE = {
    "awq (4 bits)": "demo-awq",
    "gptq (4 bits)": "demo-gptq",
    "gptq (3 bits)": "gptq-w3",
    "gptq (8 bits)": "gptq-w8",
    "compressed-tensors (W4A16)": "w4a16",
    "compressed-tensors (W8A8)": "w8a8",
    "compressed-tensors (FP8)": "fp8-dynamic",
    "fp8": "fp8-tensor",
    "hqq (4 bits)": "hqq",
    "hqq (3 bits)": "hqq-qmodel",
    "bitsandbytes (4 bits)": "bnb-nf4",
    "bitsandbytes (8 bits)": "bnb-int8",
}


@pytest.mark.parametrize("name", MADE)
def test_formats_are_as_large_as_what_tools_make(tmp_path: Path, name: str) -> None:
    made = check_model(str(checkpoints.make(MADE[name], tmp_path / "made")), {})
    size = sum(tensor.size for tensor in made.tensors.values())
    assert by_name(check_model(DEMO, {}))[name].disk == pytest.approx(size, rel=0.05)


def test_all_formats_of_the_methods_are_there_the_largest_first() -> None:
    found = in_formats(check_model(DEMO, {}))
    names = [one.name for one in found]
    assert {"float32", "bfloat16", "float16", *FILES} <= set(names)
    for method in registry.every():
        for form in method.formats:
            if method.name != "gguf" and method.bytes_per_weight(form.config):
                assert form.name in names
    assert len(set(names)) == len(names)
    assert [one.disk for one in found] == sorted((one.disk for one in found), reverse=True)
    three = by_name(check_model(DEMO, {}))["hqq (3 bits)"]
    assert three.memory < three.disk


def test_what_is_quantized_has_no_other_formats() -> None:
    assert in_formats(headers.in_awq(LLAMA_2["7B"])) == ()
    assert in_formats(Checkpoint("", LLAMA_2["7B"])) == ()


GUIDE = checkpoints.ROOT / "guides" / "sizing.md"


def rows() -> list[str]:
    """Of the guide's table."""
    names = (
        *("float32", "float16", "gptq (8 bits)", "compressed-tensors (W8A8)", "fp8", "Q8_0"),
        *("Q6_K", "Q5_K_M", "Q4_K_M", "bitsandbytes (4 bits)", "awq (4 bits)", "gptq (4 bits)"),
        *("compressed-tensors (W4A16)", "Q4_0", "gptq (3 bits)", "Q3_K_M", "Q2_K"),
    )
    sizes = [by_name(headers.plain(config)) for config in LLAMA_2.values()]
    return [
        f"| {name} | {' | '.join(f'{found[name].memory / GB:.1f}' for found in sizes)} |"
        for name in names
    ]


def test_the_guide_has_what_is_computed() -> None:
    assert "\n".join(rows()) in GUIDE.read_text(encoding="utf-8")
