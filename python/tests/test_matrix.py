"""What the quantized variants of ``matrix.py`` answer, all measured in one process of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import matrix

pytestmark = [pytest.mark.engine, pytest.mark.slow]

Result = dict[str, Any]

# All variants together take ten minutes on two cores.
TIMEOUT = 3600

# The largest and the mean difference of log-probabilities that is nothing but rounding.
EXACT = (0.004, 0.0001)

# Of those that round more than the weights, about twice what was measured.
TOLERANCES = {
    # Activations are rounded to 8 bits too, each token by a scale of its own.
    "w8a8": (0.18, 0.003),
    "torchao-int8-dynamic": (0.15, 0.003),
    # Scales are rounded to bf16 that the checkpoint has in float16.
    "demo-gptq": (0.1, 0.004),
    "auto-round": (0.06, 0.001),
    # The quantizer's library dequantizes in float32, the kernel computes otherwise.
    "bnb-nf4-double": (0.15, 0.003),
    "bnb-int8": (0.15, 0.002),
    "bnb-online": (0.15, 0.003),
    "torchao-int8": (0.15, 0.003),
    "experts-torchao-int8": (0.15, 0.003),
    "dtype-int8": (0.15, 0.003),
    "dtype-int4": (0.15, 0.003),
    # Compared with the plain model: it is what quantizing costs that is bounded.
    "fp8-online": (0.15, 0.005),
    "kv-fp8": (0.3, 0.01),
    "kv-fp8_e4m3": (0.3, 0.01),
    "kv-fp8_e5m2": (0.5, 0.02),
}

# With a kernel of fewer bits, activations are rounded to them too.
KERNEL = (0.4, 0.01)

COMPARED = [variant.name for variant in matrix.VARIANTS if variant.run is None]
QUANTIZED = [variant.name for variant in (*matrix.STORED, *matrix.IN_FLIGHT)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What was measured, by the variant's name."""
    folder = tmp_path_factory.mktemp("matrix")
    lines, log = folder / "results.jsonl", folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, matrix.__file__, str(lines)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(TIMEOUT)
        finally:
            # Nothing of it stays, whatever became of it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(log.read_text(encoding="utf-8", errors="replace")[-20_000:])
    return _read(lines)


def _read(lines: Path) -> dict[str, Result]:
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return {result["name"]: result for result in found}


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


@pytest.mark.parametrize("name", COMPARED)
def test_log_probabilities_are_those_of_its_weights(results: dict[str, Result], name: str) -> None:
    result = measured(results, name)
    largest, mean = TOLERANCES.get(name, EXACT)
    if "fp8" in name and name in QUANTIZED and not is_dequantized(result):
        largest, mean = KERNEL
    assert result["reference"]["max"] <= largest
    assert result["reference"]["mean"] <= mean
    assert result["reference"]["kl"] <= mean


@pytest.mark.parametrize("name", QUANTIZED)
def test_it_is_quantized_indeed(results: dict[str, Result], name: str) -> None:
    # What stays the same model answers to the last digit as it does.
    assert measured(results, name)["bf16"]["mean"] > 0.0005


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
    largest, mean = TOLERANCES.get(name, EXACT)
    if name not in TOLERANCES and "Quantized experts" not in (result["note"] or ""):
        largest, mean = KERNEL  # as vLLM has it for some CPUs
    assert result["reference"]["max"] <= largest
    assert result["reference"]["mean"] <= mean
    # It is quantized, and the comparison can tell.
    assert result["bf16"]["max"] > 0.03
    assert result["bf16"]["mean"] > 0.0004


def test_every_kv_cache_dtype_that_is_allowed_is_measured(results: dict[str, Result]) -> None:
    refused = measured(results, matrix.KV_REFUSED.name)
    assert refused["reason"] == "unsupported"
    allowed = {f"kv-{dtype}" for dtype in refused["details"]["allowed"]}
    assert allowed == {variant.name for variant in matrix.KV_CACHES}
