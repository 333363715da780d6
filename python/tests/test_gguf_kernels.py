"""Products with packed weights, against gguf-py's own dequantization."""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy
import pytest
import torch

from vllm_bridge.quantization.gguf import ggml, kernels, operation
from vllm_bridge.quantization.gguf.types import TYPES

NAMES = {number: packing.name for number, packing in TYPES.items()}


def packed(number: int, rows: int, columns: int) -> torch.Tensor:
    """Random blocks whose scales are ordinary numbers: any bytes are a weight."""
    packing = TYPES[number]
    blocks = rows * columns // packing.weights
    generator = numpy.random.default_rng(number)
    if packing.weights == 1:
        values = generator.standard_normal((rows, columns)).astype(numpy.float32)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType(number)).view(numpy.uint8)
        return torch.from_numpy(data.reshape(rows, -1).copy())
    data = generator.integers(0, 256, (blocks, packing.size), dtype=numpy.uint8)
    for offset in scale_offsets(packing.name):
        scales = generator.uniform(0.5, 1.5, (blocks, 1)) / 100
        data[:, offset : offset + 2] = scales.astype(numpy.float16).view(numpy.uint8)
    return torch.from_numpy(data.reshape(rows, -1))


def scale_offsets(name: str) -> tuple[int, ...]:
    """Where the 16-bit floats of a block are."""
    return {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
    }.get(name, (0,))


def reference(weight: torch.Tensor, number: int) -> torch.Tensor:
    return torch.from_numpy(
        gguf.quants.dequantize(weight.numpy(), gguf.GGMLQuantizationType(number))
    )


@pytest.fixture(params=["ggml", "torch"])
def computes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is installed."""
    if request.param == "torch":
        ggml.forget()
        monkeypatch.setattr(ggml, "library", lambda: None)
    else:
        assert ggml.library() is not None
    name: str = request.param
    return name


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("number", TYPES, ids=NAMES.get)
def test_weights_are_those_of_gguf_py_to_the_last_bit(number: int, computes: str) -> None:
    weight = packed(number, 8, 512)
    assert (TYPES[number].weights, TYPES[number].size) == gguf.GGML_QUANT_SIZES[number]
    assert TYPES[number].name == gguf.GGMLQuantizationType(number).name
    found = kernels.dequantize(weight, number, torch.float32)
    assert found.shape == (8, 512)
    # A compiler may leave out the rounding between a product and a sum.
    torch.testing.assert_close(
        found, reference(weight, number), rtol=0, atol=1e-7 if computes == "ggml" else 0
    )
    experts = weight.view(2, 4, -1)
    assert torch.equal(kernels.dequantize(experts, number, torch.float32).view(8, 512), found)
    assert kernels.dequantize(weight[:0], number, torch.bfloat16).shape == (0, 512)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tokens", [1, 6, 80])
@pytest.mark.parametrize("number", TYPES, ids=NAMES.get)
def test_products_are_those_of_the_weights(
    number: int, tokens: int, exact: bool, computes: str
) -> None:
    weight = packed(number, 24, 512)
    x = torch.randn(tokens, 1, 512, generator=torch.Generator().manual_seed(1))
    expected = x @ reference(weight, number).T
    found = kernels.matmul(x, weight, number, exact)
    is_rounded = computes == "ggml" and not exact and tokens < 80
    assert found.shape == (tokens, 1, 24)
    assert error(found, expected) < (0.02 if is_rounded else 1e-6)
    assert (error(found, expected) > 1e-4) == (is_rounded and NAMES[number] != "F32")
    halves = kernels.matmul(x.bfloat16(), weight, number, exact)
    assert halves.dtype == torch.bfloat16
    assert error(halves, expected) < 0.02
    assert kernels.matmul(x[:0], weight, number, exact).shape == (0, 1, 24)


@pytest.mark.parametrize("tokens", [1, 6, 80])
@pytest.mark.parametrize("number", TYPES, ids=NAMES.get)
def test_repacked_weights_give_the_same_products(number: int, tokens: int) -> None:
    weight = packed(number, 24, 512)
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1))
    expected = x @ reference(weight, number).T
    other = weight.clone()
    place = other.data_ptr()
    repacked = kernels.repack(other, number)
    assert (repacked == number) == torch.equal(other, weight)
    assert (other.data_ptr(), other.shape) == (place, weight.shape)
    assert error(kernels.matmul(x, other, repacked), expected) < 0.02


@pytest.mark.parametrize("tokens", [0, 1, 6, 80])
@pytest.mark.parametrize("is_gated", [False, True])
def test_two_products_in_one_call(is_gated: bool, tokens: int, computes: str) -> None:
    first, second = packed(12, 48, 512), packed(14, 32, 512)
    if is_gated:
        first = packed(12, 1024, 512)
    weights = (first, kernels.repack(first, 12)), (second, kernels.repack(second, 14))
    x = torch.randn(tokens, 1, 512, generator=torch.Generator().manual_seed(1))
    one = x @ reference(packed(12, len(first), 512), 12).T
    if is_gated:
        gate, up = one.chunk(2, -1)
        expected = (torch.nn.functional.silu(gate) * up) @ reference(second, 14).T
    else:
        expected = torch.cat([one, x @ reference(second, 14).T], -1)
    found = kernels.pair(x, *weights, is_gated)
    assert found.shape == expected.shape
    halves = kernels.pair(x.bfloat16(), *weights, is_gated)
    assert halves.dtype == torch.bfloat16
    if tokens:
        assert error(found, expected) < (0.02 if computes == "ggml" else 1e-5)
        assert error(halves, expected) < 0.02


def test_rows_that_cannot_be_interleaved_stay_as_they_are() -> None:
    weight = packed(2, 23, 64)
    assert kernels.repack(weight, 2) == 2


def test_threads_compute_side_by_side() -> None:
    weight = packed(12, 64, 512)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    expected = kernels.matmul(x, weight, 12)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kernels.matmul(x, weight, 12), range(64)))
    assert all(torch.equal(product, expected) for product in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [8, 12], ids=NAMES.get)
def test_what_is_compiled_gives_what_python_does(
    number: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed(number, 40, 512)
    type = kernels.repack(weight, number)

    def numbers(tokens: int) -> torch.Tensor:
        made = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(tokens))
        made[0] *= 3000  # some products are too large for float16
        return made.to(dtype)

    by_python = torch.ops.vllm_bridge.gguf_matmul_any
    expected = {tokens: by_python(numbers(tokens), weight, type, False) for tokens in (1, 5, 47)}
    python = Mock(wraps=ggml.matmul)
    monkeypatch.setattr(ggml, "matmul", python)
    for tokens, product in expected.items():
        x = numbers(tokens)
        assert torch.equal(kernels.matmul(x, weight, type), product)
        assert torch.equal(kernels.matmul(x[:, None], weight, type), product[:, None])
    python.assert_not_called()
    # Numbers that do not follow one another are Python's.
    apart = torch.stack([numbers(5), numbers(5)], -1)[..., 0]
    assert torch.equal(kernels.matmul(apart, weight, type), expected[5])
    python.assert_called_once()


@pytest.mark.parametrize("is_gated", [False, True])
def test_what_is_compiled_of_two_products_gives_what_python_does(
    is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = packed(12, 1024, 512), packed(14, 40, 512)
    weights = (first, kernels.repack(first, 12)), (second, kernels.repack(second, 14))
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    by_python = torch.ops.vllm_bridge.gguf_pair_any
    expected = {
        tokens: by_python(x[:tokens], *weights[0], *weights[1], is_gated) for tokens in (1, 5)
    }
    python = Mock(wraps=ggml.pair)
    monkeypatch.setattr(ggml, "pair", python)
    for tokens, product in expected.items():
        assert torch.equal(kernels.pair(x[:tokens], *weights, is_gated), product)
        assert torch.equal(kernels.pair(x[:tokens, None], *weights, is_gated), product[:, None])
    python.assert_not_called()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_second", [False, True])
def test_what_is_compiled_of_norms_gives_what_torch_does(
    is_second: bool, dtype: torch.dtype
) -> None:
    before, first, second = (packed(12, rows, 512) for rows in (512, 1024, 40))
    weights = [(weight, kernels.repack(weight, 12)) for weight in (first, second)]
    weights = weights if is_second else weights[:1]
    numbers = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(5, 512, generator=numbers).to(dtype) for _ in range(2))
    norm = (torch.rand(512, generator=numbers) / 1024).to(dtype)
    for each in (None, (before, 12)):
        given = (x, *(each or (None, 0)), residual, norm, 1e-5, *weights[0])
        given += (*weights[1], True) if is_second else (None, 0, False)
        by_torch = torch.ops.vllm_bridge.gguf_normed_any(*given)
        product, sum = kernels.normed(x, residual, norm, 1e-5, weights, is_second, each)
        assert torch.equal(sum, by_torch[1])
        # The sum of squares is not torch's to the last bit, and so are some roundings.
        assert error(product, by_torch[0].float()) < (1e-2 if dtype == torch.bfloat16 else 2e-3)
        assert product.dtype == dtype
    mixed = kernels.normed(x, residual, norm.double(), 1e-5, weights, is_second, None)
    assert mixed[0].shape == product.shape


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_GRAPHS", 3)
    weight = packed(12, 64, 512)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    expected = kernels.matmul(x, weight, 12)
    ggml.forget()
    for _ in range(3):
        for tokens in range(1, 9):
            assert torch.equal(kernels.matmul(x[:tokens], weight, 12), expected[:tokens])
            assert len(ggml._graphs()) <= 3


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "apt install g++"), ("false", "exit status 1")]
)
def test_without_a_compiler_it_is_said_what_to_do(
    compiler: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(operation, "library", functools.cache(operation.library.__wrapped__))
    ggml.forget()
    weight = packed(12, 64, 512)
    with caplog.at_level(logging.WARNING):
        assert kernels.matmul(torch.ones(1, 512), weight, 12).shape == (1, 64)
    assert said in caplog.text
    assert "decode more slowly" in caplog.text


def test_what_computes_is_told(computes: str) -> None:
    assert kernels.kernel().startswith(computes)


def test_a_product_fits_into_a_compiled_graph() -> None:
    weight = packed(8, 16, 64)
    operator = torch.ops.vllm_bridge.gguf_matmul.default
    for exact in (True, False):
        torch.library.opcheck(operator, (torch.randn(2, 64), weight, 8, exact))
    pair = torch.ops.vllm_bridge.gguf_pair.default
    torch.library.opcheck(pair, (torch.randn(2, 64), weight, 8, packed(8, 8, 64), 8, False))
    gates = packed(8, 128, 64)
    torch.library.opcheck(pair, (torch.randn(2, 64), gates, 8, weight, 8, True))
    normed = torch.ops.vllm_bridge.gguf_normed.default
    residual, norm = torch.randn(2, 64), torch.ones(64)
    given = (torch.randn(2, 64), None, 0, residual, norm, 1e-5, weight, 8, None, 0, False)
    torch.library.opcheck(normed, given)


def test_what_long_prompts_take_is_given_back() -> None:
    weight = packed(12, 64, 512)
    type = kernels.repack(weight, 12)
    assert type != 12
    before = dict(vars(ggml._thread).get("graphs", {}))
    for tokens in range(100, 110):
        kernels.matmul(torch.randn(tokens, 512), weight, type)
    assert vars(ggml._thread).get("graphs", {}) == before
