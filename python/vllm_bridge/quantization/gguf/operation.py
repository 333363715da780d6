"""The compiled operation of ``operation.cpp``. Imports torch.

It computes ``gguf_matmul`` where ``ggml`` has made the graph for it, in this thread, and leaves all
else to Python. Where there is no C++ compiler, Python computes the same.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from vllm_bridge.quantization.packed import compiled

SOURCE = Path(__file__).with_name("operation.cpp")

_TORCH = Path(torch.__file__).parent

FLAGS = (f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}", "-ltorch_cpu")


class Key(ctypes.Structure):
    """What a product is of, apart from the numbers."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("type", "rows", "columns", "tokens", "threads")
    )


class Product(ctypes.Structure):
    """A graph of ggml's and its plan, the place in it for the address of the weight, and the room
    for the numbers that go in and come out: as addresses."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("graph", "plan", "weight", "numbers", "result")
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
