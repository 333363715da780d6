"""Layers as the library hqq keeps them, and as they are computed here (``packed.grouped``). Needs
torch, and not vLLM.

hqq has a matrix in another shape: with ``axis`` 1 a row for each group, with 0 a column. It packs
the rows of that shape in as many strips as an integer of the storage holds.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vllm_bridge.quantization.hqq.settings import PACKINGS, Settings

# Scales and zero points are kept in it. hqq keeps them in what the model computes in, float16 or
# bfloat16, and scales are 5e-5 at least: no digit of either is lost.
SCALES = torch.float16


class Stored(NamedTuple):
    """A matrix, or a part of it, as ``packed.grouped`` has it but for the packing.

    Args:
        integers: rows times columns
        scales: see there
        zeros: of the shape of ``scales``
        axis: along which groups run; see ``Settings``
    """

    integers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    axis: int


def stored(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    rows: int,
    columns: int,
    settings: Settings,
) -> Stored:
    """A matrix from ``W_q``, ``scale`` and ``zero`` of hqq's.

    Raises:
        ValueError: where these are not such a matrix
    """
    count = rows * columns
    group = settings.group(rows, columns)
    integers = unpack(packed, settings)
    length = group if settings.axis == 0 else count // group
    width = count // length
    # What fills up the last strip of three bits is left out.
    filled = len(integers) - length
    if integers.shape[1:] != (width,) or not 0 <= filled < PACKINGS[settings.nbits][1]:
        raise ValueError(
            f"`W_q` of {list(packed.shape)} does not hold {rows} x {columns} integers of "
            f"{settings.nbits} bits in groups of {group}"
        )
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor.numel() != count // group:
            raise ValueError(f"`{name}` has {tensor.numel()} numbers for {count // group} groups")
    integers = integers[:length]
    if settings.bits < 8 and int(integers.max()) >> settings.bits:
        raise ValueError(f"`W_q` holds more than {settings.nbits} bits")
    return arrange(integers, scale, zero, rows, columns, settings)


def arrange(
    integers: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    rows: int,
    columns: int,
    settings: Settings,
) -> Stored:
    """A matrix from what belongs to it in hqq's shape."""
    group = settings.group(rows, columns)
    return Stored(
        integers.reshape(rows, columns),
        _spread(scale, rows, columns, group, settings.axis),
        _spread(zero, rows, columns, group, settings.axis),
        settings.axis,
    )


def scales_shape(rows: int, columns: int, settings: Settings) -> tuple[int, int]:
    """The shape of a matrix's scales in ``packed.grouped``."""
    group = settings.group(rows, columns)
    if settings.axis == 1:
        return rows, columns // math.gcd(group, columns)
    # Weight number i of the whole matrix has the scale i % across.
    across = rows * columns // group
    return across // math.gcd(across, columns), columns


def _spread(given: torch.Tensor, rows: int, columns: int, group: int, axis: int) -> torch.Tensor:
    """One number for each group as ``packed.grouped`` has them. A group of hqq's may end within a
    row, or go over several."""
    numbers = given.flatten().to(SCALES)
    if axis == 1:
        step = math.gcd(group, columns)
        return numbers.repeat_interleave(group // step).reshape(rows, columns // step)
    across = len(numbers)
    period = across // math.gcd(across, columns)
    return numbers.repeat(period * columns // across).reshape(period, columns)


def cut(whole: Stored, rows: slice, columns: slice, group: int) -> Stored:
    """A part of a matrix.

    Args:
        group: of the part's scales along a row; where it is less than the matrix's, scales are
            repeated
    """

    def scales(of: torch.Tensor) -> torch.Tensor:
        if whole.axis == 0:
            return of.roll(-rows.start, 0)[:, columns]
        step = whole.integers.shape[1] // of.shape[1]
        finer = of[rows].repeat_interleave(step // group, 1)
        return finer[:, columns.start // group : columns.stop // group]

    return Stored(
        whole.integers[rows, columns], scales(whole.scales), scales(whole.zeros), whole.axis
    )


def unpack(packed: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The integers of ``W_q``, in hqq's shape."""
    name, count = PACKINGS[settings.nbits]
    if packed.is_floating_point():  # integers under the name of floats
        packed = packed.contiguous().view(torch.int32 if name == "3bit_32" else torch.uint8)
    width = settings.bits if count > 1 else 8
    mask = (1 << width) - 1
    strips = [(packed >> (width * number)) & mask for number in reversed(range(count))]
    return torch.cat(strips).to(torch.uint8)


def plain_meta(layer: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a layer in ``qmodel.pt``, with scales and zero points as numbers: hqq once
    quantized them too, or kept both as one."""
    meta = dict(layer) | dict(layer.get("meta") or {})
    tensors = {"W_q": meta["W_q"]}
    if (bias := meta.get("bias")) is not None:
        tensors["bias"] = bias
    if (both := meta.get("zero_scale")) is not None:
        suffix = "_q" if both.dtype == torch.uint8 else ""
        meta |= {f"zero{suffix}": both[0], f"scale{suffix}": both[1]}
    for name in ("scale", "zero"):
        if (quantized := meta.get(f"{name}_q")) is not None:
            tensors[name] = _dequantized(quantized, meta[f"meta_{name}"])
        else:
            tensors[name] = meta[name]
    return tensors


def _dequantized(packed: torch.Tensor, meta: Mapping[str, Any]) -> torch.Tensor:
    """Scales or zero points that are quantized themselves."""
    settings = Settings(meta["nbits"], meta["group_size"], meta["axis"])
    scale, zero = (meta[name].float() for name in ("scale", "zero"))
    integers = unpack(packed, settings)
    shape = torch.Size(meta["shape"])
    if settings.group_size is None:  # in the shape that they have
        return ((integers - zero) * scale).reshape(shape)
    across = shape.numel() // settings.group_size
    length = settings.group_size if settings.axis == 0 else across
    return ((integers[:length] - zero) * scale).reshape(shape)
