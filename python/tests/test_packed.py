"""Layers of packed integers, against the same sums with each weight written out."""

import pytest
import torch

from vllm_bridge.quantization.packed import grouped, tables

BITS = (1, 2, 3, 4, 5, 6, 7, 8)


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
    """One by one, in double precision up to the product."""
    (rows, columns), (period, count) = q.shape, scales.shape
    group = columns // count
    plain = torch.empty(q.shape, dtype=torch.float32)
    for n in range(rows):
        for k in range(columns):
            place = n % period, k // group
            plain[n, k] = (q[n, k].float() - zeros[place].float()) * scales[place].float()
    return plain.to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("period", "count"), [(6, 1), (6, 2), (6, 64), (3, 64)], ids=["row", "two", "one", "across"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_integers_in_groups(bits: int, period: int, count: int, dtype: torch.dtype) -> None:
    q = integers(6, 64, bits)
    scales, zeros = groups(period, count, bits, torch.float32)
    plain = weights(q, scales, zeros, dtype)
    packed = grouped.pack(q, bits)
    assert torch.equal(grouped.dequantize(packed, scales, zeros, bits, 64, dtype), plain)
    for tokens in (1, 5, 100):
        x = torch.randn((tokens, 64), generator=torch.manual_seed(tokens)).to(dtype)
        product = grouped.matmul(x, packed, scales, zeros, bits)
        torch.testing.assert_close(product, (x.double() @ plain.double().T).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_of_16_bits(dtype: torch.dtype) -> None:
    q = integers(4, 32, 4)
    scales, zeros = groups(4, 2, 4, dtype)
    plain = weights(q, scales, zeros, torch.bfloat16)
    dequantized = grouped.dequantize(grouped.pack(q, 4), scales, zeros, 4, 32, torch.bfloat16)
    assert torch.equal(dequantized, plain)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tables_of_values(bits: int, dtype: torch.dtype) -> None:
    q = integers(5, 96, bits)
    values = torch.randn((5, 2**bits), generator=torch.manual_seed(bits))
    plain = torch.stack([values[n, q[n]] for n in range(5)]).to(dtype)
    packed = grouped.pack(q, bits)
    assert torch.equal(tables.dequantize(packed, values, bits, 96, dtype), plain)
    for tokens in (1, 5, 100):
        x = torch.randn((tokens, 96), generator=torch.manual_seed(tokens)).to(dtype)
        product = tables.matmul(x, packed, values, bits)
        torch.testing.assert_close(product, (x.double() @ plain.double().T).to(dtype))


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
    torch.testing.assert_close(product, (x.double() @ plain.double().T).float())


def test_compiled_graphs_take_the_operations_as_they_are() -> None:
    q = integers(8, 64, 3)
    scales, zeros = groups(8, 2, 3, torch.float32)
    values = torch.randn((8, 8), generator=torch.manual_seed(0))
    packed, x = grouped.pack(q, 3), torch.randn((4, 64), generator=torch.manual_seed(0))
    bfloat16 = torch.bfloat16
    for name, arguments in (
        ("packed_grouped_matmul", (x, packed, scales, zeros, 3)),
        ("packed_grouped_dequantize", (packed, scales, zeros, 3, 64, bfloat16)),
        ("packed_tables_matmul", (x, packed, values, 3)),
        ("packed_tables_dequantize", (packed, values, 3, 64, bfloat16)),
    ):
        torch.library.opcheck(getattr(torch.ops.vllm_bridge, name).default, arguments)
