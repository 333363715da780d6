"""What the products of one decoded token take with weights in pages of 4 KiB, and in huge pages
(``patches/cpu/huge_pages.py``): of the model of ``half_billion.py`` as Q4_K_M has it, and of a
quarter of its layers in bf16, by turns on one thread.

    OMP_NUM_THREADS=1 PYTHON bench/huge_pages.py

It counts the CPU time of the thread, so that other programs on the machine matter less.
"""

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable

import torch
from gguf_calls import HIDDEN, INNER, LAYERS, Layer, layers

from vllm_bridge.patches.cpu import huge_pages

HUGE = 2**21
MADV_NOHUGEPAGE = 15
ROUNDS = 30


class Memory:
    """Where copies of weights are put, one after the other."""

    def __init__(self, size: int, is_huge: bool) -> None:
        self._room = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes, self._end = torch.frombuffer(self._room, dtype=torch.uint8), 0
        if not is_huge:
            madvise = ctypes.CDLL(None).madvise
            madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            if madvise(self._bytes.data_ptr(), size + HUGE, MADV_NOHUGEPAGE):
                raise OSError("this system has no huge pages")

    def put(self, weight: torch.Tensor) -> torch.Tensor:
        start, self._end = self._end, self._end + -(-weight.nbytes // 64) * 64
        copy = self._bytes[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        return copy.copy_(weight)


def q4_k_m(memory: Memory, model: list[Layer]) -> Callable[[], None]:
    for layer in model:
        layer.weights = [memory.put(weight) for weight in layer.weights]

    operations = torch.ops.vllm_bridge

    def compute() -> None:
        for layer in model:
            layer.by(operations.gguf_matmul.default, operations.gguf_pair.default)

    return compute


def bf16(memory: Memory) -> Callable[[], None]:
    shapes = [(1792, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
    weights = [
        memory.put(torch.randn(shape, dtype=torch.bfloat16))
        for _ in range(LAYERS // 4)
        for shape in shapes
    ]
    inputs = {width: torch.randn(1, width, dtype=torch.bfloat16) for width in (HIDDEN, INNER)}

    def compute() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return compute


def main() -> None:
    torch.set_num_threads(1)
    pages = {"4 KiB": False, "2 MiB": True}
    ways = {
        ("Q4_K_M", name): q4_k_m(Memory(2**29, is_huge), layers())
        for name, is_huge in pages.items()
    } | {("bf16", name): bf16(Memory(2**29, is_huge)) for name, is_huge in pages.items()}
    huge_pages.collapse()
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, compute in ways.items():
                began = time.thread_time()
                compute()
                taken[name].append(1000 * (time.thread_time() - began))
    print("| weights | 4 KiB | 2 MiB | ratio |\n| --- | --- | --- | --- |")
    for of in ("Q4_K_M", "bf16"):
        small, huge = (taken[of, name] for name in pages)
        ratio = statistics.median(one / other for one, other in zip(huge, small, strict=True))
        milliseconds = " | ".join(f"{statistics.median(each):.1f}" for each in (small, huge))
        print(f"| {of} | {milliseconds} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
