"""The compiled operation of ``operation.cpp``. Imports torch.

It computes what the kernels of ``native`` do at once, of weights and activations in bfloat16, and
leaves all else to Python. Where there is no C++ compiler, Python computes the same.
"""

import ctypes
import functools
from pathlib import Path

import torch

from vllm_bridge.quantization.packed import compiled, native

SOURCE = Path(__file__).with_name("operation.cpp")

_TORCH = Path(torch.__file__).parent

# What operations of torch's are compiled with.
FLAGS = (f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}", "-ltorch_cpu")


@functools.cache
def use() -> None:
    """Has it compute from now on, in all threads, where it and the kernels can be had. It is
    compiled where it is not yet."""
    kernels = native.library()
    loaded = None if kernels is None else _library()
    if kernels is None or loaded is None:
        return
    both = (kernels.grouped_matmul, kernels.grouped_matmul_rounded)
    kernel, rounded = (ctypes.cast(function, ctypes.c_void_p) for function in both)
    rounds = native.rounds(torch.bfloat16)
    loaded.packed_use(
        kernel, rounded if rounds else None, native.has_tiles(), native.few_tokens(torch.bfloat16)
    )


def forget() -> None:
    """Leaves all to Python, until it is used again."""
    use.cache_clear()
    if _library.cache_info().currsize and (loaded := _library()):
        loaded.packed_use(None, None, 0, 0)


@functools.cache
def _library() -> ctypes.CDLL | None:
    loaded = compiled.load(
        SOURCE, *FLAGS, otherwise="Models of packed weights decode more slowly than they could"
    )
    if loaded is not None:
        loaded.packed_use.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64),
        )
        loaded.packed_use.restype = None
    return loaded
