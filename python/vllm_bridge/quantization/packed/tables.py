"""Weights as numbers of entries in a table of values, one table for each row.

Rows are packed as in ``grouped``, and a weight is ``w[n, k] = tables[n, q[n, k]]``, rounded to the
dtype that is asked for.
"""

import torch

from vllm_bridge.quantization.packed import native, strips
from vllm_bridge.quantization.packed.grouped import unpack


def matmul(x: torch.Tensor, packed: torch.Tensor, tables: torch.Tensor, bits: int) -> torch.Tensor:
    """``x`` times the transposed weights.

    Args:
        x: any shape that ends with the number of columns; float32, bfloat16 or float16
        packed: as ``grouped.pack`` has it
        tables: rows times ``2**bits``; float32, bfloat16 or float16
        bits: of a number

    Returns:
        the shape of ``x`` with the number of rows in the place of columns, in its dtype
    """
    product: torch.Tensor = torch.ops.vllm_bridge.packed_tables_matmul(x, packed, tables, bits)
    return product


def dequantize(
    packed: torch.Tensor, tables: torch.Tensor, bits: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weights as plain numbers, rows times ``columns``; the arguments are those of
    ``matmul``."""
    plain: torch.Tensor = torch.ops.vllm_bridge.packed_tables_dequantize(
        packed, tables, bits, columns, dtype
    )
    return plain


def _matmul(x: torch.Tensor, packed: torch.Tensor, tables: torch.Tensor, bits: int) -> torch.Tensor:
    columns = x.shape[-1]
    weights = _native(packed, tables, bits, columns, x.dtype)
    if weights is not None and x.numel() <= native.FEW_TOKENS * columns:
        return weights.matmul(x)

    def plain(rows: slice) -> torch.Tensor:
        if weights is not None:
            return weights.rows(rows, x.dtype)
        return _rows(packed, tables, bits, columns, x.dtype, rows)

    return strips.matmul(x, packed.shape[0], plain)


def _dequantize(
    packed: torch.Tensor, tables: torch.Tensor, bits: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    rows = packed.shape[0]
    weights = _native(packed, tables, bits, columns, dtype)
    if weights is not None:
        return weights.rows(slice(0, rows), dtype)
    plain = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    for strip in strips.of(rows, columns):
        plain[strip] = _rows(packed, tables, bits, columns, dtype, strip)
    return plain


def _native(
    packed: torch.Tensor, tables: torch.Tensor, bits: int, columns: int, dtype: torch.dtype
) -> native.Weights | None:
    if not native.takes(packed, (tables,), dtype):
        return None
    return native.Weights("tables", packed, bits, columns, (tables,))


def _rows(
    packed: torch.Tensor,
    tables: torch.Tensor,
    bits: int,
    columns: int,
    dtype: torch.dtype,
    rows: slice,
) -> torch.Tensor:
    """Some of the weights."""
    return tables[rows].to(dtype).gather(1, unpack(packed[rows], bits, columns).long())


strips.operation(
    "packed_tables_matmul(Tensor x, Tensor packed, Tensor tables, int bits)",
    _matmul,
    lambda x, packed, tables, bits: x.new_empty((*x.shape[:-1], packed.shape[0])),
)
strips.operation(
    "packed_tables_dequantize(Tensor packed, Tensor tables, int bits, int columns, "
    "ScalarType dtype)",
    _dequantize,
    lambda packed, tables, bits, columns, dtype: packed.new_empty(
        (packed.shape[0], columns), dtype=dtype
    ),
)
