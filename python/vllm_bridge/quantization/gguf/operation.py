"""The compiled operations of ``operation.cpp``. Imports torch.

They compute products where ``ggml`` has made the graph for it, in this thread, with the norm before
them, and leave all else to Python. Where there is no C++ compiler, Python computes the same.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

from vllm_bridge.quantization.packed import compiled
from vllm_bridge.quantization.packed.operation import FLAGS

SOURCE = Path(__file__).with_name("operation.cpp")

# What a graph computes: a product, two of the same numbers, or one of what another makes of them.
SINGLE, BESIDE, GATED = range(3)

# Weights that a graph has at most.
MOST = 2


class Key(ctypes.Structure):
    """What is computed, apart from the numbers. The second weight of one has neither type nor
    rows."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("kind", "tokens", "threads", "columns"),
            *("first_type", "first_rows", "second_type", "second_rows"),
        )
    )


class Product(ctypes.Structure):
    """A graph of ggml's and its plan, the places in it for the addresses of the weights, and the
    room for the numbers that go in and for the results, which come out side by side: as
    addresses."""

    _fields_ = (
        ("graph", ctypes.c_void_p),
        ("plan", ctypes.c_void_p),
        ("weights", ctypes.c_void_p * MOST),
        ("numbers", ctypes.c_void_p),
        ("results", ctypes.c_void_p * MOST),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compiled, where it is not yet; None where that cannot be, which is logged."""
    return compiled.load(SOURCE, *FLAGS, otherwise="GGUF models decode more slowly than they could")


def keep(compute: Any, key: Key, product: Product) -> None:
    """Has this thread compute a product, from now on, by a graph.

    Args:
        compute: ggml's function for graphs
        product: valid until all are forgotten
    """
    if loaded := library():
        loaded.gguf_keep(compute, ctypes.byref(key), ctypes.byref(product))


def forget() -> None:
    """Leaves all products of this thread to Python again."""
    if loaded := library():
        loaded.gguf_forget()
