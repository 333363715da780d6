"""Keys and values in an FP8 cache on a CPU."""

import pytest
import torch
from vllm import _custom_ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_bridge.patches.cpu import kv_cache as patch

HEADS, HEAD_SIZE, BLOCK_SIZE = 2, 64, 128

DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not current_platform.is_cpu() or not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM has FP8 caches for CPUs with AVX-512 alone")
    # To be undone.
    operation = _custom_ops.cpu_attn_reshape_and_cache
    monkeypatch.setattr(
        _custom_ops,
        "cpu_attn_reshape_and_cache",
        getattr(operation, "__wrapped__", operation),
    )
    patch.apply()


def cached(
    numbers: torch.Tensor, scale: float, name: str, *, rounding: bool = True
) -> torch.Tensor:
    """What vLLM's operation makes of keys, in the order of their size."""
    operation = _custom_ops.cpu_attn_reshape_and_cache
    if not rounding:
        operation = operation.__wrapped__
    cache = torch.zeros(1, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=torch.uint8)
    keys, values = cache.view(1, HEADS, 2 * BLOCK_SIZE, HEAD_SIZE).chunk(2, dim=2)
    shaped = numbers.reshape(BLOCK_SIZE, HEADS, HEAD_SIZE)
    operation(
        shaped,
        -shaped,
        keys,
        values,
        torch.arange(BLOCK_SIZE),
        _get_attn_isa(numbers.dtype, BLOCK_SIZE, HEAD_SIZE, name),
        k_scale=scale,
        v_scale=scale,
        kv_cache_dtype=name,
    )
    stored = keys.contiguous().view(DTYPES[name]).float().flatten().sort().values
    negated = values.contiguous().view(DTYPES[name]).float().flatten().sort().values
    assert torch.equal(negated, (-stored).sort().values)
    return stored * scale


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_become_the_nearest_that_the_cache_can_hold(
    name: str, scale: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(BLOCK_SIZE * HEADS * HEAD_SIZE).to(dtype)
    exact = numbers.float().sort().values
    nearest = (exact / scale).to(DTYPES[name]).float() * scale
    assert torch.equal(cached(numbers, scale, name), nearest)
    # vLLM's own leave digits out.
    cut = cached(numbers, scale, name, rounding=False)
    assert (cut - exact).abs().mean() > 1.8 * (nearest - exact).abs().mean()
    assert (cut.abs() <= exact.abs() + 1e-6).all()


@pytest.mark.parametrize("name", DTYPES)
def test_numbers_too_large_become_the_largest(name: str) -> None:
    numbers = torch.full((BLOCK_SIZE * HEADS * HEAD_SIZE,), 1e6, dtype=torch.bfloat16)
    largest = torch.finfo(DTYPES[name]).max
    assert cached(numbers, 1.0, name).unique().tolist() == [largest]


def test_other_dtypes_are_left_alone() -> None:
    given = torch.randn(BLOCK_SIZE, HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    got: list[torch.Tensor] = []

    def operation(key: torch.Tensor, value: torch.Tensor, *_rest: object, **_named: object) -> None:
        got.extend([key, value])

    patch.rounding(operation)(given, given, kv_cache_dtype="auto")
    assert got[0] is given
    assert got[1] is given
