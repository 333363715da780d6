"""The kernels of ``kernels.cpp``.

Where there is no C++ compiler, or the weights are not on a CPU, torch computes the same.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from vllm_bridge.patches.cpu import amx
from vllm_bridge.quantization.packed import compiled

SOURCE = Path(__file__).with_name("kernels.cpp")

# OpenMP's library is left out: torch has loaded one, and two would take each other's cores.
FLAGS = ("-fno-exceptions", "-fopenmp", "-nodefaultlibs", "-lgcc", "-lc")

# What computes where there are no kernels, for people to read.
TORCH = "torch (dequantized for each product)"

# The numbers of ``Type`` in the source.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Weights:
    """A layer, as the kernels take it.

    Args:
        kind: ``grouped`` or ``tables``
        packed: rows of bits
        bits: of a number
        columns: of a row
        values: what numbers become values with, of one dtype
        sizes: what else the structure of the kind has
    """

    def __init__(
        self,
        kind: str,
        packed: torch.Tensor,
        bits: int,
        columns: int,
        values: tuple[torch.Tensor, ...],
        *sizes: int,
    ) -> None:
        self._kind, self._bits, self._columns = kind, bits, columns
        # They must live as long as their addresses are used.
        self._tensors = [tensor.contiguous() for tensor in (packed, *values)]
        numbers = (
            self._tensors[0].data_ptr(),
            packed.shape[1],
            packed.shape[0],
            columns,
            *(tensor.data_ptr() for tensor in self._tensors[1:]),
            _TYPES[values[0].dtype],
            *sizes,
        )
        # Pointers and `int64_t` alike take 8 bytes.
        self._fields = (ctypes.c_int64 * len(numbers))(*numbers)

    def matmul(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """The product, and something that is added to it, in float32, before it is rounded."""
        x = x.contiguous()
        if added is not None:
            added = added.contiguous()
        product = x.new_empty((*x.shape[:-1], self._tensors[0].shape[0]))
        tokens = x.numel() // self._columns
        sums = None if added is None else added.data_ptr()
        self._call(
            *("matmul", x.data_ptr(), tokens, _TYPES[x.dtype], product.data_ptr(), sums),
            has_tiles(),
        )
        return product

    def matmul_rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The product with ``x`` rounded to 8 bits, of groups that ``can_round`` takes."""
        x = x.contiguous()
        product = x.new_empty((*x.shape[:-1], self._tensors[0].shape[0]))
        self._call("matmul_rounded", x.data_ptr(), x.numel() // self._columns, product.data_ptr())
        return product

    def rows(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some of the weights as plain numbers."""
        plain = torch.empty((rows.stop - rows.start, self._columns), dtype=dtype)
        self._call("dequantize", rows.start, rows.stop, _TYPES[dtype], plain.data_ptr())
        return plain

    def _call(self, name: str, *arguments: int | None) -> None:
        function = getattr(library(), f"{self._kind}_{name}")
        function(self._fields, self._bits, *arguments, torch.get_num_threads())


def takes(packed: torch.Tensor, values: tuple[torch.Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether there are kernels for these weights, and for numbers of this dtype."""
    return (
        packed.device.type == "cpu"
        and dtype in _TYPES
        and values[0].dtype in _TYPES
        and all(tensor.dtype == values[0].dtype for tensor in values)
        and library() is not None
    )


def kernel(is_cpu: bool = True) -> str:
    """What computes products with packed weights, for people to read."""
    if not is_cpu:
        return "torch (layer by layer)"
    if library() is None:
        return TORCH
    return "C++ compiled for this CPU" + (" (AVX-512 bfloat16)" if has_vectors() else "")


def note(is_cpu: bool) -> str | None:
    """What users should know of an engine whose layers the kernels compute, or would."""
    if not is_cpu:
        return "Weights stay packed; torch dequantizes them layer by layer for each product."
    if library() is not None:
        return None
    said = "Weights stay packed, and torch dequantizes them for each product. "
    if compiled.compiler() is None:
        return (
            f"{said}With a C++ compiler (`g++`) products are computed several times as fast: "
            "install one, and start the engine again."
        )
    return (
        f"{said}The kernels that compute products several times as fast could not be made here: "
        "the log of the engine says why."
    )


def can_round(bits: int, group: int, dtype: torch.dtype) -> bool:
    """Whether products of groups of this size with activations of this dtype are faster if these
    are rounded to 8 bits."""
    loaded = library()
    return loaded is not None and rounds(dtype) and bool(loaded.can_round(bits, group))


def rounds(dtype: torch.dtype) -> bool:
    """Whether such products are faster for some sizes. The processor's tiles are as fast without
    that."""
    loaded = library()
    return (
        loaded is not None
        and dtype == torch.bfloat16
        and not has_tiles()
        and bool(loaded.can_round(4, 128))
    )


def rounding_note(dtype: torch.dtype) -> str:
    """What users should know of an engine whose activations are to be rounded to 8 bits, and whose
    layers are computed here."""
    if rounds(dtype):
        return (
            "Activations are rounded to 8 bits in layers of 2, 4 and 8 bits whose groups are "
            "multiples of 32."
        )
    if library() is None:
        why = "the kernels are not compiled"
    elif has_tiles():
        why = "with AMX products are as fast without"
    elif dtype != torch.bfloat16:
        why = f"the model computes in {str(dtype).removeprefix('torch.')}, not in bfloat16"
    else:
        why = "the processor lacks AVX-512's bfloat16, VBMI or VNNI"
    return f"Activations are not rounded to 8 bits: {why}."


def has_vectors() -> bool:
    """Whether the kernels have what makes them several times as fast as bfloat16."""
    loaded = library()
    return loaded is not None and bool(loaded.has_vectors())


def few_tokens(dtype: torch.dtype) -> int:
    """Up to so many tokens are multiplied with weights as they are unpacked. For more of them a
    strip of plain weights and oneDNN's product are faster, as measured."""
    if dtype != torch.bfloat16 or not has_vectors():
        return 16
    return 256 if has_tiles() else 64


def has_tiles() -> bool:
    """Whether products of more than a few tokens are by the processor's tiles, Intel's AMX."""
    loaded = library()
    return loaded is not None and bool(loaded.has_tiles()) and _has_amx()


@functools.cache
def _has_amx() -> bool:
    """Whether Linux and the user let this process use it."""
    amx.apply()
    return bool(torch.cpu._is_amx_tile_supported())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had, which is logged. The first process on a
    machine to call this takes the seconds that compiling takes."""
    loaded = compiled.load(
        SOURCE,
        *FLAGS,
        otherwise="Packed weights are computed by torch, many times slower than they could be",
    )
    return None if loaded is None else _typed(loaded)


def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    for kind in ("grouped", "tables"):
        matmul: Any = getattr(loaded, f"{kind}_matmul")
        numbers = (pointer, integer, pointer, integer, integer)
        matmul.argtypes = (*numbers, pointer, pointer, integer, integer)
        dequantize: Any = getattr(loaded, f"{kind}_dequantize")
        dequantize.argtypes = (pointer, integer, integer, integer, integer, pointer, integer)
        matmul.restype = dequantize.restype = None
    rounded: Any = loaded.grouped_matmul_rounded
    rounded.argtypes = (pointer, integer, pointer, integer, pointer, integer)
    rounded.restype = integer
    loaded.can_round.argtypes = (integer, integer)
    loaded.can_round.restype = integer
    loaded.has_vectors.restype = loaded.has_tiles.restype = integer
    return loaded
