"""Weights as numbers of entries in a table of values, one table for each row.

Rows are packed as in ``grouped``, and a weight is ``w[n, k] = tables[n, q[n, k]]``, rounded to the
dtype that is asked for. A few weights may have something added to them (``sparse``).
"""

import torch

from vllm_bridge.quantization.packed import native, sparse, strips
from vllm_bridge.quantization.packed.grouped import unpack
from vllm_bridge.quantization.packed.sparse import Sparse


def matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    bits: int,
    added: Sparse | None = None,
) -> torch.Tensor:
    """``x`` times the transposed weights.

    Args:
        x: any shape that ends with the number of columns; float32, bfloat16 or float16
        packed: as ``grouped.pack`` has it
        tables: rows times ``2**bits``; float32, bfloat16 or float16
        bits: of a number
        added: to the weights

    Returns:
        the shape of ``x`` with the number of rows in the place of columns, in its dtype
    """
    product: torch.Tensor = torch.ops.vllm_bridge.packed_tables_matmul(
        x, packed, tables, bits, *(added or (None, None, None))
    )
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


def _matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    bits: int,
    starts: torch.Tensor | None,
    places: torch.Tensor | None,
    values: torch.Tensor | None,
) -> torch.Tensor:
    added = None
    if starts is not None and places is not None and values is not None:
        added = Sparse(starts, places, values)
    rows, columns = packed.shape[0], x.shape[-1]
    weights = _native(packed, tables, bits, columns, x.dtype)
    if weights is not None and x.numel() <= native.few_tokens(x.dtype) * columns:
        return weights.matmul(x, None if added is None else sparse.matmul(x, added))

    def plain(strip: slice) -> torch.Tensor:
        if weights is not None:
            found = weights.rows(strip, x.dtype)
        else:
            found = _rows(packed, tables, bits, columns, x.dtype, strip)
        return found if added is None or not is_cpu else sparse.add(found, added, strip)

    is_cpu = x.device.type == "cpu"
    product = strips.matmul(x, rows, plain)
    # A GPU is not waited for.
    return product if added is None or is_cpu else (product + sparse.matmul(x, added)).to(x.dtype)


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
    "packed_tables_matmul(Tensor x, Tensor packed, Tensor tables, int bits, Tensor? starts, "
    "Tensor? places, Tensor? values)",
    _matmul,
    lambda x, packed, *_: x.new_empty((*x.shape[:-1], packed.shape[0])),
)
strips.operation(
    "packed_tables_dequantize(Tensor packed, Tensor tables, int bits, int columns, "
    "ScalarType dtype)",
    _dequantize,
    lambda packed, tables, bits, columns, dtype: packed.new_empty(
        (packed.shape[0], columns), dtype=dtype
    ),
)
