"""What the quantized variants of ``matrix.py`` answer, all measured in one process of their own."""

from typing import Any

import pytest

import gguf_models
import matrix
import measuring

pytestmark = [pytest.mark.engine, pytest.mark.slow]

Result = dict[str, Any]

# The largest and the mean difference of log-probabilities that is nothing but rounding: of no
# variant it was more than half of this.
EXACT = (0.003, 0.00005)

# Of those that round activations to integers. Nothing differed here; on another CPU one sum may be
# rounded otherwise, which makes another integer and shows in the answer, but in one place only.
INTEGERS = (0.04, 0.0001)
ROUNDED = tuple(variant.name for variant in matrix.ROUNDED)
ROUNDING_TO_INTEGERS = ("w8a8", "torchao-int8-dynamic", "bnb-int8")

# Of those that add products up in another order than the reference, by a kernel or with their
# inputs reordered: where a sum is rounded otherwise, the answer differs by the last bit of what is
# computed in bf16, which is 0.06 of a large logit. A layer alone is as near as bf16 itself. With
# the tiles of AMX hardly a sum is rounded otherwise; with AVX-512 alone up to 0.056 and 0.00032.
REORDERED = (0.07, 0.0005)
IN_ANOTHER_ORDER = (
    *("gptq-w3", "gptq-w4-act", "gptq-w4-asym-act", "gptq-w8"),
    "squeezellm-sparse",
    *ROUNDED,
)

# GGUF files with experts, which are added up in 32 bits where vLLM's plain ones are in 16, and with
# biases, which are added to products that were rounded.
GGUF_ROUNDED = (0.1, 0.008)

# Of llama.cpp, which rounds nothing to bfloat16: half of it already for weights in float16. Without
# knowing anything the probabilities are smaller, and differ by more.
LLAMA_CPP = (0.15, 0.005)
LLAMA_CPP_UNLEARNED = (0.15, 0.03)

# With a kernel of fewer bits, activations are rounded to them too.
KERNEL = (0.4, 0.01)

# What the linear layers take, relative to those of the plain model: the weights and their scales.
# Where groups are small, those of few bits take as much as one more bit would.
TWO_BITS, THREE_BITS = 0.2, 0.23
FOUR_BITS = 0.3
# Rows are so short here that tables take as much as a fifth of what is in them.
WITH_TABLES = {"squeezellm": (0.25, 0.31), "squeezellm-sparse": (0.1875, 0.27)}
EIGHT_BITS = 0.53
SIXTEEN_BITS = 1.02
# What a process may take or let go while it loads, in bytes.
MEMORY_BESIDE = 20_000_000
IN_FOUR_BITS = (
    *("demo-awq", "demo-gptq", "auto-round", "w4a16", "w4a16-asym"),
    *("gptq-w4-act", "gptq-w4-asym-act"),
    *ROUNDED,
    *("bnb-nf4", "bnb-fp4", "bnb-nf4-double", "bnb-online", "dtype-int4", "hqq", "hqq-online"),
)
IN_THREE_BITS = ("gptq-w3", "auto-round-w3", "hqq-qmodel")

# The table of rotary embeddings, which no file has.
ROTARY_BYTES = 8192 * 64 * 2

COMPARED = [variant.name for variant in matrix.VARIANTS if variant.run is None]
QUANTIZED = [variant.name for variant in (*matrix.STORED, *matrix.ROUNDED, *matrix.ONLINE)]
EMULATED_CACHES = [variant.name for variant in matrix.KV_CACHES if variant.emulation]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What was measured, by the variant's name."""
    return measuring.results(matrix.__file__, tmp_path_factory.mktemp("matrix"))


def measured(results: dict[str, Result], name: str) -> Result:
    result = results[name]
    assert "error" not in result, result["error"]
    return result


def is_dequantized(result: Result) -> bool:
    """Whether the weights were dequantized while they were loaded."""
    return "computed in" in (result["note"] or "")


@pytest.mark.parametrize("name", COMPARED)
def test_it_says_every_sentence(results: dict[str, Result], name: str) -> None:
    result = measured(results, name)
    assert result["wrong"] == {}
    assert result["otherwise"] == {}


def tolerance(name: str, result: Result) -> tuple[float, float]:
    if uses_fp8_kernel(name, result):
        return KERNEL
    if name in IN_ANOTHER_ORDER:
        return REORDERED
    return INTEGERS if name in ROUNDING_TO_INTEGERS else EXACT


def uses_fp8_kernel(name: str, result: Result) -> bool:
    return name.startswith("fp8") and not is_dequantized(result)


@pytest.mark.parametrize("name", COMPARED)
def test_log_probabilities_are_those_of_its_weights(results: dict[str, Result], name: str) -> None:
    result = measured(results, name)
    largest, mean = tolerance(name, result)
    assert result["reference"]["max"] <= largest
    assert result["reference"]["mean"] <= mean
    assert result["reference"]["kl"] <= mean


@pytest.mark.parametrize("name", [*QUANTIZED, *EMULATED_CACHES])
def test_they_are_not_those_of_the_plain_model(results: dict[str, Result], name: str) -> None:
    result = measured(results, name)
    # What stays the same model answers to the last digit as it does.
    assert result["bf16"]["mean"] > 0.0005
    if not uses_fp8_kernel(name, result):
        # Eight bits are so near that sums which are rounded otherwise are a tenth of it: 9.6 times
        # with AVX-512 alone.
        times = 5 if name == "gptq-w8" else 10
        assert result["bf16"]["mean"] > times * result["reference"]["mean"]
        assert result["bf16"]["kl"] > 10 * result["reference"]["kl"]
        if name not in (*ROUNDING_TO_INTEGERS, *IN_ANOTHER_ORDER):
            assert result["bf16"]["max"] > 10 * result["reference"]["max"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_its_layers_take_as_little_memory_as_its_bits(
    results: dict[str, Result], name: str
) -> None:
    result = measured(results, name)
    weight, plain = result["weight"], result["bf16_weight"]
    share = weight["linear"] / plain["linear"]
    if name in WITH_TABLES:
        least, most = WITH_TABLES[name]
        assert least < share < most
    elif name in IN_THREE_BITS:
        assert 0.1875 < share < THREE_BITS
    elif name in IN_FOUR_BITS:
        assert 0.25 < share < FOUR_BITS
    elif name == "gptq-w2":
        assert 0.125 < share < TWO_BITS
    elif is_dequantized(result):
        assert 0.98 < share < SIXTEEN_BITS
    else:
        assert 0.5 < share < EIGHT_BITS
    # Embeddings stay in 16 bits; not every method has them prepared for a kernel besides.
    assert 0.8 < weight["others"] / plain["others"] < 1.01


def test_what_weights_take_is_what_the_process_takes(results: dict[str, Result]) -> None:
    """Of a model of 300 MB, beside which what else a process holds does not count."""
    weighed = measured(results, matrix.WEIGHED.name)
    plain = weighed["bf16"]["linear"]
    for name, bits in (
        ("bf16", SIXTEEN_BITS),
        ("int8", EIGHT_BITS),
        ("int4", FOUR_BITS),
        ("fp8", SIXTEEN_BITS),
        ("awq", FOUR_BITS),
        ("gguf", 0.54),  # Q8_0: 34 bytes for 32 weights
    ):
        weight = weighed[name]
        exact = weight["linear"] + weight["others"]
        assert weight["linear"] < bits * plain, name
        assert weight["heap"] == pytest.approx(exact, rel=0.15, abs=MEMORY_BESIDE), name
        assert weight["private"] == pytest.approx(exact, rel=0.15, abs=MEMORY_BESIDE), name
        # What is foreseen before loading is the least, and not much less than it comes to.
        assert weight["foreseen"] > 0.85 * exact, name
        assert weight["foreseen"] < max(weight["private"], weight["peak"]), name
    gguf = weighed["gguf"]
    assert gguf["linear"] + gguf["others"] < 1.1 * gguf["file"]


@pytest.mark.parametrize("name", [variant.name for variant in matrix.ADAPTED])
def test_an_adapter_applies_over_it(results: dict[str, Result], name: str) -> None:
    result = measured(results, name)
    assert result["wrong"] == {}
    assert result["adapted_wrong"] == {}


@pytest.mark.parametrize("name", [variant.name for variant in matrix.EMBEDDING])
def test_vectors_are_those_of_its_weights(results: dict[str, Result], name: str) -> None:
    result = measured(results, name)
    assert result["cosine"] > 0.9999
    assert 0.97 < result["bf16_cosine"] < 0.99999
    assert result["other_cosine"] < 0.9


@pytest.mark.parametrize("name", [variant.name for variant in matrix.EXPERTS])
def test_a_mixture_of_experts(results: dict[str, Result], name: str) -> None:
    result = measured(results, name)
    assert result["wrong"] == {}
    assert result["otherwise"] == {}
    largest, mean = EXACT
    # torchao leaves experts as they are.
    if "torchao" not in name and "Quantized experts" not in (result["note"] or ""):
        largest, mean = KERNEL  # as vLLM has it for some CPUs
    assert result["reference"]["max"] <= largest
    assert result["reference"]["mean"] <= mean
    # It is quantized, and the comparison can tell.
    assert result["bf16"]["max"] > 0.03
    assert result["bf16"]["mean"] > 0.0004


@pytest.mark.parametrize("name", [variant.name for variant in matrix.GGUF])
def test_a_gguf_file_computes_with_its_weights(results: dict[str, Result], name: str) -> None:
    result = measured(results, name)
    if "qwen2" not in name:  # which knows nothing
        assert result["wrong"] == {}
        assert result["otherwise"] == {}
    largest, mean = GGUF_ROUNDED if "mixture" in name or "qwen2" in name else EXACT
    assert result["reference"]["max"] <= largest
    assert result["reference"]["mean"] <= mean
    assert result["reference"]["kl"] <= mean


@pytest.mark.parametrize("name", [variant.name for variant in matrix.GGUF])
def test_a_gguf_file_answers_as_it_does_in_llama_cpp(results: dict[str, Result], name: str) -> None:
    said = measured(results, name)["llama_cpp"]
    largest, mean = LLAMA_CPP
    if "qwen2" in name:
        largest, mean = LLAMA_CPP_UNLEARNED
    else:
        assert said["otherwise"] == {}
    assert said["max"] <= largest
    assert said["mean"] <= mean


@pytest.mark.parametrize(
    "name", [one.name for one in matrix.GGUF if not one.name.endswith(gguf_models.PLAIN)]
)
def test_a_packed_gguf_file_takes_no_more_memory_than_its_size(
    results: dict[str, Result], name: str
) -> None:
    result = measured(results, name)
    weight = result["weight"]["linear"] + result["weight"]["others"] - ROTARY_BYTES
    # The file has the tokenizer in it, too.
    assert 0.95 < weight / result["disk_bytes"] < 1.1


def test_every_kv_cache_dtype_that_is_allowed_is_measured(results: dict[str, Result]) -> None:
    refused = measured(results, matrix.KV_REFUSED.name)
    assert refused["reason"] == "unsupported"
    allowed = {f"kv-{dtype}" for dtype in refused["details"]["allowed"]}
    assert allowed == {variant.name for variant in matrix.KV_CACHES}
