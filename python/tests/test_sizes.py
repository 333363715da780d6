"""What engines take is what was estimated: of the models of ``sizes.py``, loaded in one process of
their own."""

from typing import Any

import pytest

import measuring
import sizes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Of each way to count one: packed weights, room for adapters, a cache of another dtype, windows
# beside whole layers, a latent vector with experts, a state beside attention.
SAMPLE = ("awq", "lora", "kv-fp8", "gemma3_text", "deepseek_v2", "granitemoehybrid")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return measuring.results(sizes.__file__, tmp_path_factory.mktemp("sizes"), *SAMPLE)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_cache_is_as_large_as_estimated(measured: dict[str, dict[str, Any]], name: str) -> None:
    result = measured[name]

    assert result["cache"] == result["estimated_cache"]
    assert result["tokens"] == result["estimated_tokens"]


@pytest.mark.parametrize("name", SAMPLE)
def test_weights_take_what_was_estimated(measured: dict[str, dict[str, Any]], name: str) -> None:
    result = measured[name]

    assert result["estimated_weights"] == pytest.approx(result["weights"], rel=0.02)
