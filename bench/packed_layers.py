"""How long one layer takes in each type that a CPU computes, by the number of tokens: ms of CPU
time, the median of calls by turns, so that what else the machine does matters less.

    OMP_NUM_THREADS=1 PYTHON bench/packed_layers.py [SIZE]

with the Python of the library's environment (`mix vllm.doctor` names it), and the `gguf` extra. A
layer has SIZE inputs and as many outputs, 2048 if none is given. Each type has as many layers as
fill MEMORY, which are computed one after the other: the weights come from memory, as those of a
model do. GGUF's types are by ggml, as llama.cpp has them.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from vllm import _custom_ops as vllms

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from vllm_bridge.patches.cpu import amx
from vllm_bridge.quantization.gguf import kernels
from vllm_bridge.quantization.gguf.types import TYPES
from vllm_bridge.quantization.packed import grouped, native, tables

TOKENS = (1, 4, 16, 64, 512)
ROUNDS = 15
MEMORY = 2**26

Layer = Callable[[torch.Tensor], torch.Tensor]


def bf16(size: int) -> Layer:
    handler = vllms.create_onednn_mm(torch.randn(size, size).bfloat16().t(), 32)
    return lambda x: vllms.onednn_mm(handler, x, None)


def w8a8(size: int) -> Layer:
    weight = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    handler = vllms.create_onednn_scaled_mm(
        weight.t(), torch.rand(size, 1), torch.bfloat16, True, False, 32
    )

    def compute(x: torch.Tensor) -> torch.Tensor:
        integers, scale, _ = vllms.onednn_scaled_int8_quant(x)
        return vllms.onednn_scaled_mm(
            handler, integers, torch.empty_like(x), scale, None, None, None
        )

    return compute


def groups(size: int, bits: int, group: int, rounded: bool = False) -> Layer:
    packed = grouped.pack(torch.randint(0, 2**bits, (size, size)), bits)
    scales = torch.rand(size, size // group).bfloat16()
    zeros = torch.full_like(scales, 2.0 ** (bits - 1))
    return lambda x: grouped.matmul(x, packed, scales, zeros, bits, rounded)


def values(size: int, bits: int) -> Layer:
    packed = grouped.pack(torch.randint(0, 2**bits, (size, size)), bits)
    table = torch.randn(size, 2**bits).bfloat16()
    return lambda x: tables.matmul(x, packed, table, bits)


def gguf(size: int, type: int) -> Layer:
    packing = TYPES[type]
    # Any bytes are weights; without the highest bits no scale is huge.
    weight = torch.randint(0, 60, (size, size // packing.weights * packing.size)).byte()
    kind = kernels.repack(weight, type)
    return lambda x: kernels.matmul(x, weight, kind)


# What makes a layer, and the bits of a weight.
KINDS: dict[str, tuple[Callable[[int], Layer], float]] = {
    "bf16": (bf16, 16),
    "W8A8": (w8a8, 8),
    **{
        f"{bits} bits in groups of {group}": (
            lambda size, bits=bits, group=group: groups(size, bits, group),
            bits,
        )
        for bits, group in ((2, 128), (3, 128), (4, 128), (4, 32), (8, 128))
    },
    **{
        f"{bits} bits in groups of {group}, activations in 8": (
            lambda size, bits=bits, group=group: groups(size, bits, group, True),
            bits,
        )
        for bits, group in ((2, 128), (4, 128), (4, 32), (8, 128))
    },
    **{
        f"tables of {2**bits} values": (lambda size, bits=bits: values(size, bits), bits)
        for bits in (3, 4)
    },
    **{
        f"GGUF {TYPES[number].name}": (
            lambda size, number=number: gguf(size, number),
            8 * TYPES[number].size / TYPES[number].weights,
        )
        for number in (2, 8, 12)
    },
}


def turns(layers: list[Layer], x: torch.Tensor) -> Iterator[float]:
    """The CPU time of each next one."""
    for layer in itertools.cycle(layers):
        began = time.thread_time()
        layer(x)
        yield 1000 * (time.thread_time() - began)


def main(size: int) -> None:
    amx.apply()
    print(f"{native.kernel()}, tiles: {native.has_tiles()}, {size} x {size}\n")
    print(f"| | {' | '.join(map(str, TOKENS))} |")
    print("| --- |" + " --- |" * len(TOKENS))
    made = {
        name: [make(size) for _ in range(max(1, int(MEMORY / (size * size * bits / 8))))]
        for name, (make, bits) in KINDS.items()
    }
    rows: dict[str, list[str]] = {name: [] for name in made}
    for count in TOKENS:
        x = torch.randn(count, size).bfloat16()
        each = {name: turns(layers, x) for name, layers in made.items()}
        taken = [{name: next(times) for name, times in each.items()} for _ in range(ROUNDS + 1)]
        for name, row in rows.items():
            row.append(f"{statistics.median(times[name] for times in taken[1:]):.2f}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2048)
