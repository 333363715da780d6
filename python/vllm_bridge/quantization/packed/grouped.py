"""Weights as small integers with a scale and a zero point for each group.

A row of a layer is a stream of bits: integer ``k`` takes the bits from ``k * bits``, counted from
the lowest one of the first byte. With ``R, G = scales.shape``, the groups of a row are of
``g = columns / G``, and a weight is

    w[n, k] = (q[n, k] - zeros[n % R, k // g]) * scales[n % R, k // g]

computed in float32 and rounded to the dtype that is asked for. ``R`` is the number of rows where
groups run along them; it is less, and ``g`` is 1, where they run across.
"""

import math

import torch

from vllm_bridge.quantization.packed import native, operation, strips


def pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of bits.

    Args:
        integers: rows times columns, of any integer type, each from 0 to ``2**bits - 1``
        bits: of each, 1 to 8

    Returns:
        uint8: rows times ``ceil(columns * bits / 8)``
    """
    rows, columns = integers.shape
    count = _filling(bits)
    step = count * bits // 8
    packed = torch.empty(
        (rows, -(-columns // count) * step), dtype=torch.uint8, device=integers.device
    )
    # By the places in a word: a few operations on whole rows, in small integers.
    for part in strips.of(rows, columns):
        numbers = torch.nn.functional.pad(integers[part].to(_word(bits)), (0, -columns % count))
        words = numbers[:, ::count].clone()
        for place in range(1, count):
            words |= numbers[:, place::count] << place * bits
        for byte in range(step):
            packed[part, byte::step] = (words >> 8 * byte).to(torch.uint8)
    return packed[:, : _bytes(columns, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The integers of ``pack``, as uint8: rows times ``columns``."""
    count = _filling(bits)
    step = count * bits // 8
    octets = torch.nn.functional.pad(packed, (0, -packed.shape[1] % step)).to(_word(bits))
    words = octets[:, ::step].clone()
    for byte in range(1, step):
        words |= octets[:, byte::step] << 8 * byte
    integers = torch.empty(
        (len(packed), words.shape[1], count), dtype=torch.uint8, device=packed.device
    )
    for place in range(count):
        integers[:, :, place] = (words >> place * bits) & 2**bits - 1
    return integers.flatten(1)[:, :columns]


def matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    rounded: bool = False,
) -> torch.Tensor:
    """``x`` times the transposed weights.

    Args:
        x: any shape that ends with the number of columns; float32, bfloat16 or float16
        packed: as ``pack`` has it
        scales: float32, bfloat16 or float16
        zeros: of the dtype of ``scales`` and its shape, or ``[1, 1]``: one for all
        bits: of an integer
        rounded: whether ``x`` may be rounded to integers of 8 bits, with a scale for each 128, 64
            or 32 columns: as many as the size of a group is a multiple of. It is where that is
            faster (``native.can_round``), which is seen here and not where layers are made:
            compiled graphs are kept for the next start, which may be on another processor.

    Returns:
        the shape of ``x`` with the number of rows in the place of columns, in its dtype
    """
    product: torch.Tensor = torch.ops.vllm_bridge.packed_grouped_matmul(
        x, packed, scales, zeros, bits, rounded
    )
    return product


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weights as plain numbers, rows times ``columns``; the arguments are those of
    ``matmul``."""
    plain: torch.Tensor = torch.ops.vllm_bridge.packed_grouped_dequantize(
        packed, scales, zeros, bits, columns, dtype
    )
    return plain


def _bytes(columns: int, bits: int) -> int:
    return (columns * bits + 7) // 8


def _filling(bits: int) -> int:
    """How many integers fill whole bytes."""
    return 8 // math.gcd(8, bits)


def _word(bits: int) -> torch.dtype:
    """A type that holds so many."""
    size = _filling(bits) * bits
    if size == 8:
        return torch.uint8
    return torch.int32 if size < 32 else torch.int64


def _matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    rounded: bool = False,
) -> torch.Tensor:
    operation.use()
    columns = x.shape[-1]
    weights = _native(packed, scales, zeros, bits, columns, x.dtype)
    if weights is not None and rounded:
        group = columns // scales.shape[1]
        if native.can_round(bits, group, x.dtype):
            return weights.matmul_rounded(x)
    if weights is not None and x.numel() <= native.few_tokens(x.dtype) * columns:
        return weights.matmul(x)

    def plain(rows: slice) -> torch.Tensor:
        if weights is not None:
            return weights.rows(rows, x.dtype)
        return _rows(packed, scales, zeros, bits, columns, x.dtype, rows)

    return strips.matmul(x, packed.shape[0], plain)


def _dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    rows = packed.shape[0]
    weights = _native(packed, scales, zeros, bits, columns, dtype)
    if weights is not None:
        return weights.rows(slice(0, rows), dtype)
    plain = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    for strip in strips.of(rows, columns):
        plain[strip] = _rows(packed, scales, zeros, bits, columns, dtype, strip)
    return plain


def _native(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> native.Weights | None:
    if not native.takes(packed, (scales, zeros), dtype):
        return None
    period, groups = scales.shape
    return native.Weights(
        "grouped",
        packed,
        bits,
        columns,
        (scales, zeros),
        period,
        groups,
        columns // groups,
        int(zeros.numel() > 1),
    )


def _rows(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    columns: int,
    dtype: torch.dtype,
    rows: slice,
) -> torch.Tensor:
    """Some of the weights."""
    groups = torch.arange(rows.start, rows.stop, device=packed.device) % scales.shape[0]
    scale, zero = (
        values.expand_as(scales)[groups].float().unsqueeze(2) for values in (scales, zeros)
    )
    integers = unpack(packed[rows], bits, columns).unflatten(1, (scales.shape[1], -1))
    return ((integers - zero) * scale).to(dtype).flatten(1)


# The first one is ``operation``'s as well, which leaves to the other what it does not do itself.
for _suffix in ("", "_any"):
    strips.operation(
        f"packed_grouped_matmul{_suffix}(Tensor x, Tensor packed, Tensor scales, Tensor zeros, "
        "int bits, bool rounded=False)",
        _matmul,
        lambda x, packed, *_: x.new_empty((*x.shape[:-1], packed.shape[0])),
    )
strips.operation(
    "packed_grouped_dequantize(Tensor packed, Tensor scales, Tensor zeros, int bits, "
    "int columns, ScalarType dtype)",
    _dequantize,
    lambda packed, scales, zeros, bits, columns, dtype: packed.new_empty(
        (packed.shape[0], columns), dtype=dtype
    ),
)
