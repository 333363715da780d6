"""What the bytes of ggml's types mean, in torch, on any device.

A row of a weight is a sequence of blocks, and a block some integers with their scales. What comes
out is ggml's own value to the last bit, in 32-bit floats; gguf-py computes the same in numpy, and a
test compares. Source: ``gguf/quants.py`` of gguf-py, ``ggml-common.h`` of ggml for the layouts.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

# The 16 values of a weight in IQ4_NL and IQ4_XS: ggml's `kvalues_iq4nl`.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Type(NamedTuple):
    """A type of packed weights.

    Args:
        name: ggml's
        weights: how many a block has
        size: a block's, in bytes
        values: from the bytes of blocks [blocks, size] to their weights [blocks, weights]
    """

    name: str
    weights: int
    size: int
    values: Callable[[torch.Tensor], torch.Tensor]


def _halves(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.float16).float()


def _fields(data: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The integers of ``bits`` bits in each block's bytes: of every ``group`` bytes first all the
    lowest ones, then all those above them."""
    bytes_ = data.reshape(len(data), -1, 1, group)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    return ((bytes_ >> shifts) & (2**bits - 1)).reshape(len(data), -1)


def _scaled(scales: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    """Each scale times the integers that share it."""
    groups = integers.float().view(*scales.shape, -1)
    return (scales.unsqueeze(-1) * groups).flatten(1)


def _shifted(scales: torch.Tensor, integers: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The same less the offset of each scale."""
    groups = integers.float().view(*scales.shape, -1)
    return (scales.unsqueeze(-1) * groups - offsets.unsqueeze(-1)).flatten(1)


def _f32(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.float32)


def _bf16(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.bfloat16).float()


def _q4_0(data: torch.Tensor) -> torch.Tensor:
    return _scaled(_halves(data[:, :2]), _fields(data[:, 2:], 4, 16).char() - 8)


def _q4_1(data: torch.Tensor) -> torch.Tensor:
    scales, offsets = _halves(data[:, :4]).chunk(2, 1)
    return _shifted(scales, _fields(data[:, 4:], 4, 16), -offsets)


def _five(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return _fields(low, 4, 16) | (_fields(high, 1, 1) << 4)


def _q5_0(data: torch.Tensor) -> torch.Tensor:
    return _scaled(_halves(data[:, :2]), _five(data[:, 2:6], data[:, 6:]).char() - 16)


def _q5_1(data: torch.Tensor) -> torch.Tensor:
    scales, offsets = _halves(data[:, :4]).chunk(2, 1)
    return _shifted(scales, _five(data[:, 4:8], data[:, 8:]), -offsets)


def _q8_0(data: torch.Tensor) -> torch.Tensor:
    return _scaled(_halves(data[:, :2]), data[:, 2:].contiguous().view(torch.int8))


def _q2_k(data: torch.Tensor) -> torch.Tensor:
    packed, integers = data[:, :16], _fields(data[:, 16:80], 2, 32)
    scale, offset = _halves(data[:, 80:]).chunk(2, 1)
    return _shifted(scale * (packed & 15).float(), integers, offset * (packed >> 4).float())


def _q3_k(data: torch.Tensor) -> torch.Tensor:
    high, low, packed = data[:, :32], data[:, 32:96], data[:, 96:108]
    scales = _fields(packed[:, :8], 4, 8) | (_fields(packed[:, 8:], 2, 4) << 4)
    # Where the high bit is not set, four are taken away.
    integers = _fields(low, 2, 32).char() - ((_fields(high, 1, 32) ^ 1) << 2).char()
    return _scaled(_halves(data[:, 108:]) * (scales.char() - 32).float(), integers)


def _six_bit_scales(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and offsets of Q4_K and Q5_K, each eight in their first 16 bytes."""
    scale, offset = _halves(data[:, :4]).chunk(2, 1)
    first, second, rest = data[:, 4:16].chunk(3, 1)
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), 1)
    offsets = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), 1)
    return scale * scales.float(), offset * offsets.float()


def _q4_k(data: torch.Tensor) -> torch.Tensor:
    scales, offsets = _six_bit_scales(data)
    return _shifted(scales, _fields(data[:, 16:], 4, 32), offsets)


def _q5_k(data: torch.Tensor) -> torch.Tensor:
    scales, offsets = _six_bit_scales(data)
    integers = _fields(data[:, 48:], 4, 32) | (_fields(data[:, 16:48], 1, 32) << 4)
    return _shifted(scales, integers, offsets)


def _q6_k(data: torch.Tensor) -> torch.Tensor:
    integers = _fields(data[:, :128], 4, 64) | (_fields(data[:, 128:192], 2, 32) << 4)
    scales = data[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(_halves(data[:, 208:]) * scales, integers.char() - 32)


def _iq4(indices: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_IQ4, dtype=torch.int8, device=indices.device)[indices.int()]


def _iq4_nl(data: torch.Tensor) -> torch.Tensor:
    return _scaled(_halves(data[:, :2]), _iq4(_fields(data[:, 2:], 4, 16)))


def _iq4_xs(data: torch.Tensor) -> torch.Tensor:
    scales = _fields(data[:, 4:8], 4, 1) | (_fields(data[:, 2:4], 2, 1) << 4)
    integers = _iq4(_fields(data[:, 8:], 4, 16))
    return _scaled(_halves(data[:, :2]) * (scales.char() - 32).float(), integers)


# By ggml's number, which is what a file has.
TYPES: Mapping[int, Type] = {
    0: Type("F32", 1, 4, _f32),
    1: Type("F16", 1, 2, _halves),
    2: Type("Q4_0", 32, 18, _q4_0),
    3: Type("Q4_1", 32, 20, _q4_1),
    6: Type("Q5_0", 32, 22, _q5_0),
    7: Type("Q5_1", 32, 24, _q5_1),
    8: Type("Q8_0", 32, 34, _q8_0),
    10: Type("Q2_K", 256, 84, _q2_k),
    11: Type("Q3_K", 256, 110, _q3_k),
    12: Type("Q4_K", 256, 144, _q4_k),
    13: Type("Q5_K", 256, 176, _q5_k),
    14: Type("Q6_K", 256, 210, _q6_k),
    20: Type("IQ4_NL", 32, 18, _iq4_nl),
    23: Type("IQ4_XS", 256, 136, _iq4_xs),
    30: Type("BF16", 1, 2, _bf16),
}
