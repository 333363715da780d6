"""How many weights the tensors of a checkpoint stand for, by their headers."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm_bridge.checkpoints.checkpoint import CAST, Checkpoint
from vllm_bridge.checkpoints.gguf import TYPES
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.quantization.scheme import Scheme, digits

# What lies beside packed weights: scales, zero points, tables and orders.
_BESIDE = re.compile(
    r"[._:](?:scales?|scale_inv|scale_\d|(?:weight|input)_(?:scale|zero_point|shape|g_idx)\w*"
    r"|\w*_scales?|\w*_scale_inv|zeros?|q?zeros|g_idx|biases|SCB|weight_format|lookup_table"
    r"|rows|cols|vals|full_rows|full_row_indices|startrows|nested_\w+|absmax|quant_map"
    r"|q_(?:scale|scale_max|groups|group_map|invperm|perm))$|\.quant_state\."
)

# What is computed anew from the config: angles of positions, and their numbers.
_BUFFER = re.compile(r"(?:inv_freq|position_ids)$")

_WORDS = ("I32", "U32")
_WORD = 32
_BYTE = 8


class Count(NamedTuple):
    """How many weights a tensor holds.

    Args:
        name: the tensor's
        number: how many there are
        bits: of each, where it is quantized
    """

    name: str
    number: int
    bits: float | None = None


def counts(checkpoint: Checkpoint, scheme: Scheme) -> Iterator[Count]:
    """How many weights each tensor that has some holds; nothing where no headers were read.

    Args:
        scheme: how the checkpoint is quantized
    """
    is_plain = checkpoint.quantization is None
    # HQQ has the settings of a layer beside it, as tensors.
    hqq = {name.removesuffix("W_q") for name in checkpoint.tensors if name.endswith(".W_q")}
    for name, tensor in checkpoint.tensors.items():
        layer, dot, part = name.rpartition(".")
        if _BUFFER.search(name):
            continue
        if layer + dot in hqq:
            if part == "W_q":
                yield from _packed(name, tensor, checkpoint.tensors, scheme)
            elif part == "bias":
                yield Count(name, math.prod(tensor.shape))
        elif (kind := TYPES.get(tensor.dtype)) is not None and kind.block > 1:
            yield Count(name, math.prod(tensor.shape), digits(kind.name))
        elif tensor.dtype in CAST:
            if is_plain or not _BESIDE.search(name):
                yield Count(name, math.prod(tensor.shape))
        elif is_plain:
            yield Count(name, math.prod(tensor.shape))
        elif not _BESIDE.search(name):
            yield from _packed(name, tensor, checkpoint.tensors, scheme)


def _packed(
    name: str, tensor: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme
) -> Iterator[Count]:
    layer = name.rpartition(".")[0]
    bits = scheme.bits or _BYTE
    if name.endswith(".W_q") or tensor.dtype in _WORDS:
        count = _by_scales(tensor, layer, tensors, scheme)
        if count is None:
            per_word = _WORD // bits if name.endswith(".weight_packed") else _WORD / bits
            width = per_word / _WORD if tensor.dtype in _WORDS else 1 / bits
            yield Count(name, int(tensor.size * _BYTE * width), bits)
        else:
            # Some leave a part of each word empty.
            measured = math.floor(tensor.size * _BYTE / count)
            yield Count(name, count, bits if math.floor(bits) == measured else measured)
    elif tensor.dtype == "U8" and bits < _BYTE:
        yield Count(name, int(tensor.size * _BYTE / bits), bits)
    elif tensor.dtype in ("U8", "I8") or tensor.dtype.startswith("F8"):
        yield Count(name, tensor.size, bits)


def _by_scales(
    tensor: Tensor, layer: str, tensors: Mapping[str, Tensor], scheme: Scheme
) -> int | None:
    """How many weights a packed matrix has, by what lies beside it, which does not depend on the
    bits: they may be others than those of most layers."""
    scales = None
    for part in ("scales", "scale", "scale_q", "weight_scale", "zero_q"):
        if (scales := tensors.get(f"{layer}.{part}")) is not None:
            break
    if scales is None:
        return None
    order = tensors.get(f"{layer}.g_idx")
    if len(scales.shape) == 2 and len(tensor.shape) == 2 and order is not None:
        return math.prod(order.shape) * tensor.shape[1]
    if tensor.dtype == "I32" and len(tensor.shape) == 2 and tensor.shape[1] != scales.shape[-1]:
        groups = scales.shape[0]
        if scheme.group_size == -1 or groups * (scheme.group_size or 0) == tensor.shape[0]:
            return tensor.shape[0] * scales.shape[-1]  # AWQ's: packed along the outputs
    if scheme.group_size is None or scheme.group_size <= 0:
        return None
    return math.prod(scales.shape) * scheme.group_size
