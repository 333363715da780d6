"""What plain models would take in other formats."""

import dataclasses
import math
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
from vllm_bridge.sizing.fields import Fields
from vllm_bridge.sizing.formats import InFormat, in_formats
from vllm_bridge.sizing.gguf_types import FILES, header_bytes

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


# Of Llama 3.1 8B, as tools/quantize/README.md of https://github.com/ggml-org/llama.cpp says.
BITS_PER_WEIGHT = {
    "F16": 16.0005, "Q8_0": 8.5008, "Q6_K": 6.5633, "Q5_K_M": 5.7036, "Q5_K_S": 5.5704,
    "Q4_K_M": 4.8944, "IQ4_NL": 4.6818, "Q4_K_S": 4.6672, "IQ4_XS": 4.4597, "Q3_K_L": 4.2979,
    "Q3_K_S": 3.6429, "Q2_K": 3.1593,
}  # fmt: skip


def test_gguf_files_have_the_bits_per_weight_that_llama_cpp_says() -> None:
    plain = headers.plain(LLAMA_3_8B)
    weights = sum(math.prod(tensor.shape) for tensor in plain.tensors.values())
    for name, bits in BITS_PER_WEIGHT.items():
        size = by_name(plain)[name].disk - header_bytes(Fields(LLAMA_3_8B))
        assert round(size * 8 / weights, 4) == bits, name


# In GB, to three digits, as the hub's listings of these repositories' files say.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "mradermacher/Llama-2-7b-hf-GGUF": (
        LLAMA_2["7B"],
        {
            "Q2_K": 2.53, "Q3_K_S": 2.95, "Q3_K_M": 3.30, "Q3_K_L": 3.60, "IQ4_XS": 3.65,
            "Q4_K_S": 3.86, "Q4_K_M": 4.08, "Q5_K_S": 4.65, "Q5_K_M": 4.78, "Q6_K": 5.53,
            "Q8_0": 7.16, "F16": 13.5,
        },
    ),
    "tensorblock/Llama-2-7b-hf-GGUF": (LLAMA_2["7B"], {"Q4_0": 3.83, "Q5_0": 4.65}),
    "mradermacher/Llama-2-13b-hf-GGUF": (
        LLAMA_2["13B"],
        {
            "Q2_K": 4.85, "Q3_K_S": 5.66, "Q3_K_M": 6.34, "Q3_K_L": 6.93, "IQ4_XS": 7.02,
            "Q4_K_S": 7.42, "Q4_K_M": 7.87, "Q5_K_S": 8.97, "Q5_K_M": 9.23, "Q6_K": 10.7,
            "Q8_0": 13.8,
        },
    ),
    "mradermacher/Llama-2-70b-hf-GGUF": (
        LLAMA_2["70B"],
        {
            "Q2_K": 25.5, "Q3_K_S": 29.9, "Q3_K_M": 33.3, "Q3_K_L": 36.1, "IQ4_XS": 37.2,
            "Q4_K_S": 39.2, "Q4_K_M": 41.4, "Q5_K_S": 47.5, "Q5_K_M": 48.8,
        },
    ),
    "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF": (
        LLAMA_3_8B, {"Q3_K_M": 4.02, "Q4_K_M": 4.92},
    ),
    "TheBloke/Mixtral-8x7B-v0.1-GGUF": (
        MIXTRAL, {"Q4_0": 26.4, "Q5_0": 32.2, "Q6_K": 38.4},
    ),
    "itlwas/Mixtral-8x7B-Instruct-v0.1-Q4_K_M-GGUF": (MIXTRAL, {"Q4_K_M": 28.4}),
}  # fmt: skip


@pytest.mark.parametrize("repository", PUBLISHED)
def test_gguf_files_are_as_large_as_published_ones(repository: str) -> None:
    config, sizes = PUBLISHED[repository]
    found = by_name(headers.plain(config))
    for name, size in sizes.items():
        assert found[name].disk / GB == pytest.approx(size, rel=0.003), name


# In bytes, of Llama 3 8B, as `sizes.txt` of https://huggingface.co/ddh0/UnquantizedEmbeddingTesting
# says. They have the same tokenizer, of which the size is estimated.
BYTES = {
    "BF16": 16068890912, "Q3_K_L": 4321956128, "Q3_K_M": 4018917664, "Q3_K_S": 3664498976,
    "Q2_K": 3179131168,
}  # fmt: skip


def test_a_model_without_an_output_layer_has_its_embeddings_for_it() -> None:
    tied = headers.plain(LLAMA_3_8B | {"tie_word_embeddings": True})
    unsaid = {name: value for name, value in tied.config.items() if name != "tie_word_embeddings"}
    assert in_formats(dataclasses.replace(tied, config=unsaid)) == in_formats(tied)


def test_the_tensors_of_gguf_files_are_as_large_as_published_ones_to_the_byte() -> None:
    found = by_name(headers.plain(LLAMA_3_8B))
    (rest,) = {size - found[name].disk for name, size in BYTES.items()}
    assert 0 < rest < 2_000_000


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
        assert found[type].disk - header_bytes(Fields(source.config)) == size, type


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
