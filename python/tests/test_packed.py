"""Layers of packed integers, against the same sums with each weight written out."""

import asyncio
import ctypes
import logging
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emulation import by_columns
from vllm_bridge import quantization
from vllm_bridge.patches.cpu import experts, fp8
from vllm_bridge.quantization.packed import compiled, grouped, native, operation, tables

BITS = (1, 2, 3, 4, 5, 6, 7, 8)


@pytest.fixture(autouse=True)
def by_python_first() -> Iterator[None]:
    """A test may have its own of what the operation without Python is told once."""
    operation.forget()
    yield
    operation.forget()


@pytest.fixture(params=["compiled", "torch"])
def computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels, and without them."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    else:
        assert native.library() is not None


def integers(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.manual_seed(bits))


def written_out(row: torch.Tensor, bits: int) -> bytes:
    """One stream of bits, made as a number of any length."""
    number = sum(int(value) << (bits * place) for place, value in enumerate(row))
    return number.to_bytes((len(row) * bits + 7) // 8, "little")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [64, 37])
def test_rows_are_streams_of_bits(bits: int, columns: int) -> None:
    q = integers(3, columns, bits)
    packed = grouped.pack(q, bits)
    assert [bytes(row.tolist()) for row in packed] == [written_out(row, bits) for row in q]
    assert torch.equal(grouped.unpack(packed, bits, columns), q.to(torch.uint8))


def groups(rows: int, count: int, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.manual_seed(bits)
    scales = torch.rand((rows, count), generator=generator) * 0.02 + 0.001
    zeros = torch.rand((rows, count), generator=generator) * 2**bits
    return scales.to(dtype), zeros.to(dtype)


def weights(
    q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    (rows, columns), (period, count) = q.shape, scales.shape
    group = columns // count
    n, k = torch.arange(rows).unsqueeze(1) % period, torch.arange(columns) // group
    return ((q.float() - zeros.float()[n, k]) * scales.float()[n, k]).to(dtype)


def assert_is_product(product: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
    """Up to the rounding of a sum in float32, and then of the result."""
    exact = x.double() @ weights.double().T
    terms = x.double().abs() @ weights.double().abs().T
    allowed = exact.abs() * torch.finfo(product.dtype).eps + terms * 2e-6
    assert ((product.double() - exact).abs() <= allowed).all()


GROUPS = {
    # Columns, rows of scales, scales of a row.
    "a group a row": (64, 10, 1),
    "of 32": (64, 10, 2),
    "of 16": (64, 10, 4),
    "of 12": (60, 10, 5),
    "of 1": (64, 10, 64),
    "across": (64, 5, 64),
    "across, of odd rows": (36, 5, 36),
    "odd columns": (45, 10, 1),
    "odd groups": (90, 10, 2),
    "of several blocks": (2112, 10, 33),
    "whole words, of 32": (256, 10, 8),
    "whole words, of 64": (256, 10, 4),
    "whole words, of 128": (1408, 10, 11),
    "whole words, of a row": (384, 10, 1),
}


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_integers_in_groups(bits: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    columns, period, count = shape
    q = integers(10, columns, bits)
    scales, zeros = groups(period, count, bits, torch.float32)
    plain = weights(q, scales, zeros, dtype)
    packed = grouped.pack(q, bits)
    assert torch.equal(grouped.dequantize(packed, scales, zeros, bits, columns, dtype), plain)
    for tokens in (1, 3, 7, 70):
        x = torch.randn((tokens, columns), generator=torch.manual_seed(tokens)).to(dtype)
        product = grouped.matmul(x, packed, scales, zeros, bits)
        assert_is_product(product, x, plain)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", GROUPS.values(), ids=GROUPS)
def test_tiles_of_the_processor(
    bits: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native.library()
    if library is None or not library.has_tiles() or not torch.cpu._init_amx():
        pytest.skip("this processor has no AMX, or the kernel keeps it")
    monkeypatch.setattr(native, "_has_amx", lambda: True)
    columns, period, count = shape
    q = torch.cat([integers(10, columns, bits)] * 5)
    scales, zeros = groups(5 * period, count, bits, torch.float32)
    plain, packed = weights(q, scales, zeros, torch.bfloat16), grouped.pack(q, bits)
    for tokens in (5, 16, 70, 300):
        x = torch.randn((tokens, columns), generator=torch.manual_seed(tokens)).bfloat16()
        assert_is_product(grouped.matmul(x, packed, scales, zeros, bits), x, plain)


# By how many columns share a scale of the activations.
ROUNDED = {
    "32 of a group": (32, (96, 40, 3)),
    "32 of 96": (32, (672, 40, 7)),
    "64 of a group": (64, (448, 40, 7)),
    "128 of a group": (128, (1408, 40, 11)),
    "128 of a row": (128, (1152, 40, 1)),
    "32 of a row": (32, (1056, 40, 1)),
    "groups shared by rows": (32, (64, 20, 2)),
}


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tiles are not used, which are as fast without."""
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    if not native.rounds(torch.bfloat16):
        pytest.skip(
            "this processor lacks AVX-512's bfloat16, VBMI or VNNI, or there is no compiler"
        )


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("width", "shape"), ROUNDED.values(), ids=ROUNDED)
def test_activations_in_8_bits(bits: int, width: int, shape: tuple[int, int, int]) -> None:
    columns, period, count = shape
    q = integers(40, columns, bits)
    scales, zeros = groups(period, count, bits, torch.bfloat16)
    packed = grouped.pack(q, bits)
    for zero in (zeros, zeros[:1, :1]):
        plain = weights(q, scales, zero.expand_as(zeros), torch.float32)
        for tokens in (1, 6, 7, 300):
            x = torch.randn((tokens, columns), generator=torch.manual_seed(tokens)).bfloat16()
            x[0, :width] = 0
            # Without Python, and by it.
            for name in ("packed_grouped_matmul", "packed_grouped_matmul_any"):
                multiply = getattr(torch.ops.vllm_bridge, name)
                product = multiply(x, packed, scales, zero, bits, True)
                assert_is_product(product, by_columns(x, width), plain)


@pytest.mark.usefixtures("rounding")
def test_a_token_with_nan_is_nan_and_no_other_is() -> None:
    q = integers(40, 256, 4)
    scales, zeros = groups(40, 2, 4, torch.bfloat16)
    x = torch.ones((3, 256)).bfloat16()
    x[1, 5] = float("nan")
    product = grouped.matmul(x, grouped.pack(q, 4), scales, zeros, 4, rounded=True)
    assert product.isnan().all(1).tolist() == [False, True, False]
    assert not product[[0, 2]].isnan().any()


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(("bits", "columns", "count"), [(3, 256, 2), (4, 64, 4), (4, 400, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_activations_of_other_layers_are_not_rounded(
    bits: int, columns: int, count: int, dtype: torch.dtype
) -> None:
    q = integers(40, columns, bits)
    scales, zeros = groups(40, count, bits, torch.bfloat16)
    plain, packed = weights(q, scales, zeros, dtype), grouped.pack(q, bits)
    for tokens in (1, 7, 300):
        x = torch.randn((tokens, columns), generator=torch.manual_seed(tokens)).to(dtype)
        product = grouped.matmul(x, packed, scales, zeros, bits, rounded=True)
        assert_is_product(product, x, plain)


@pytest.mark.usefixtures("rounding")
def test_activations_are_rounded_where_that_gains_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert native.can_round(4, 128, torch.bfloat16)
    assert not native.can_round(4, 128, torch.float16)
    assert native.rounding_note(torch.bfloat16).startswith("Activations are rounded to 8 bits in")
    assert native.rounding_note(torch.float16).endswith("computes in float16, not in bfloat16.")
    monkeypatch.setattr(native, "has_tiles", lambda: True)
    assert not native.can_round(4, 128, torch.bfloat16)
    assert native.rounding_note(torch.bfloat16).endswith("with AMX products are as fast without.")


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("shape", GROUPS.values(), ids=GROUPS)
def test_one_zero_point_for_all(shape: tuple[int, int, int]) -> None:
    columns, period, count = shape
    q = integers(10, columns, 4)
    scales, zeros = groups(period, count, 4, torch.float32)
    one = zeros[:1, :1]
    plain = weights(q, scales, one.expand_as(zeros), torch.float16)
    packed, x = grouped.pack(q, 4), torch.ones((3, columns), dtype=torch.float16)
    dequantized = grouped.dequantize(packed, scales, one, 4, columns, torch.float16)
    assert torch.equal(dequantized, plain)
    assert_is_product(grouped.matmul(x, packed, scales, one, 4), x, plain)


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [32, 384])
def test_scales_of_16_bits(dtype: torch.dtype, columns: int) -> None:
    q = integers(9, columns, 4)
    packed = grouped.pack(q, 4)
    scales, zeros = groups(9, 3 if columns == 384 else 2, 4, dtype)
    for zero in (zeros, zeros[:1, :1]):
        plain = weights(q, scales, zero.expand_as(zeros), torch.bfloat16)
        dequantized = grouped.dequantize(packed, scales, zero, 4, columns, torch.bfloat16)
        assert torch.equal(dequantized, plain)
        for tokens in (1, 6):
            x = torch.randn((tokens, columns), generator=torch.manual_seed(tokens)).bfloat16()
            assert_is_product(grouped.matmul(x, packed, scales, zero, 4), x, plain)


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [96, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tables_of_values(bits: int, columns: int, dtype: torch.dtype) -> None:
    q = integers(5, columns, bits)
    values = torch.randn((5, 2**bits), generator=torch.manual_seed(bits))
    plain = torch.stack([values[n, q[n]] for n in range(5)]).to(dtype)
    packed = grouped.pack(q, bits)
    assert torch.equal(tables.dequantize(packed, values, bits, columns, dtype), plain)
    for tokens in (1, 5, 100):
        x = torch.randn((tokens, columns), generator=torch.manual_seed(tokens)).to(dtype)
        product = tables.matmul(x, packed, values, bits)
        assert_is_product(product, x, plain)


@pytest.mark.usefixtures("computed")
def test_a_layer_of_many_strips() -> None:
    q = integers(3000, 512, 4)
    scales, zeros = groups(3000, 4, 4, torch.bfloat16)
    packed = grouped.pack(q, 4)
    assert torch.equal(grouped.unpack(packed, 4, 512), q.to(torch.uint8))
    plain = grouped.dequantize(packed, scales, zeros, 4, 512, torch.float32)
    each = (q.unflatten(1, (4, -1)) - zeros.float()[..., None]) * scales.float()[..., None]
    assert torch.equal(plain, each.flatten(1))
    x = torch.randn((2, 7, 512), generator=torch.manual_seed(0))
    product = grouped.matmul(x, packed, scales, zeros, 4)
    assert product.shape == (2, 7, 3000)
    assert_is_product(product, x, plain)


def test_compiled_graphs_take_the_operations_as_they_are() -> None:
    q = integers(8, 64, 3)
    scales, zeros = groups(8, 2, 3, torch.float32)
    values = torch.randn((8, 8), generator=torch.manual_seed(0))
    packed, x = grouped.pack(q, 3), torch.randn((4, 64), generator=torch.manual_seed(0))
    bfloat16 = torch.bfloat16
    two = ("packed_grouped_matmul_any", "packed_grouped_matmul")
    of_32 = (scales[:, :1].bfloat16(), zeros[:, :1].bfloat16())
    for name, arguments in (
        ("packed_grouped_matmul", (x, packed, scales, zeros, 3)),
        *((name, (x.bfloat16(), packed, scales.bfloat16(), zeros.bfloat16(), 3)) for name in two),
        *((name, (x[:, :32].bfloat16(), packed[:, :16], *of_32, 4, True)) for name in two),
        ("packed_grouped_dequantize", (packed, scales, zeros, 3, 64, bfloat16)),
        ("packed_tables_matmul", (x, packed, values, 3, None, None, None)),
        ("packed_tables_dequantize", (packed, values, 3, 64, bfloat16)),
    ):
        torch.library.opcheck(getattr(torch.ops.vllm_bridge, name).default, arguments)


@pytest.mark.slow
def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiled.build(tmp_path / "kernels", native.SOURCE, *native.FLAGS)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert ctypes.CDLL(str(path)).grouped_matmul
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    assert compiled.build(path.parent, native.SOURCE, *native.FLAGS) == path


@pytest.fixture
def untried() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("compiler", "said", "noted"),
    [
        ("no-such-compiler", "apt install g++", "install one"),
        ("false", "non-zero exit status 1", "the log of the engine says why"),
    ],
)
def test_without_a_compiler_it_is_said_what_to_do(
    compiler: str,
    said: str,
    noted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert native.library() is None
    assert said in caplog.text
    assert native.kernel() == "torch (dequantized for each product)"
    assert noted in str(native.note(is_cpu=True))


def test_layers_of_vllm_without_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: Any) -> None:
        return None

    model = SimpleNamespace(quantization="auto_gptq", dtype=torch.bfloat16)
    config = SimpleNamespace(model_config=model, additional_config={})
    llm = SimpleNamespace(model_config=model, vllm_config=config)
    for module in (fp8, experts):
        monkeypatch.setattr(module, "note", nothing)

    def note(kernel: str | None) -> str | None:
        return asyncio.run(quantization.note(llm, None, kernel))

    assert note("PackedLinearKernel") is None
    monkeypatch.setattr(native, "library", lambda: None)
    for ours in ("PackedLinearKernel", native.kernel()):
        assert "torch dequantizes them" in str(note(ours))
    for other in ("CPUWNA16LinearKernel", None):
        assert note(other) is None


@pytest.mark.usefixtures("untried")
def test_a_user_without_a_home_is_told_what_to_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert native.library() is None
    assert "Name a cache folder in XDG_CACHE_HOME" in caplog.text


def test_nothing_is_loaded_that_others_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written to by others"):
        compiled.build(tmp_path, native.SOURCE)
    tmp_path.chmod(0o700)
    compiled._check_owner(tmp_path)
    status = SimpleNamespace(st_uid=os.geteuid() + 1, st_mode=stat.S_IFDIR | 0o700)
    monkeypatch.setattr(Path, "stat", lambda _path: status)
    with pytest.raises(PermissionError, match="can be written to by others"):
        compiled._check_owner(tmp_path)


def test_there_is_one_openmp() -> None:
    # In a process of its own: some packages bring one that only they use.
    code = (
        "from vllm_bridge.quantization.packed import native; native.library();"
        "print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(native.SOURCE.parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"/\S+/lib[gi]?omp[^/\s]*\.so\S*", maps.stdout)
    assert len(set(found)) == 1
