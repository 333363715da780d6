"""How long one layer of packed weights takes beside bfloat16, by the number of tokens: ms, the best
of many calls, so that what else the machine does counts little.

    PYTHON bench/packed_layers.py [SIZE]

with the Python of the library's environment (`mix vllm.doctor` names it). A layer has SIZE inputs
and as many outputs, 4096 if none is given.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from vllm_bridge.quantization.packed import grouped, native, tables

TOKENS = (1, 4, 16, 64, 512)
SECONDS = 4  # for each figure

Layer = Callable[[torch.Tensor], torch.Tensor]


def layers(size: int) -> Iterator[tuple[str, Layer]]:
    weight = torch.randn(size, size).bfloat16()
    yield "bf16", lambda x: torch.nn.functional.linear(x, weight)
    for bits, group in ((2, 128), (3, 128), (4, 128), (4, 32), (8, 128)):
        packed = grouped.pack(torch.randint(0, 2**bits, (size, size)), bits)
        scales = torch.rand(size, size // group).bfloat16()
        zeros = torch.full_like(scales, 2.0 ** (bits - 1))
        yield (
            f"{bits} bits in groups of {group}",
            lambda x, p=packed, s=scales, z=zeros, b=bits: grouped.matmul(x, p, s, z, b),
        )
    for bits in (3, 4):
        packed = grouped.pack(torch.randint(0, 2**bits, (size, size)), bits)
        values = torch.randn(size, 2**bits).bfloat16()
        yield (
            f"tables of {2**bits} values",
            lambda x, p=packed, v=values, b=bits: tables.matmul(x, p, v, b),
        )


def milliseconds(layer: Layer, x: torch.Tensor) -> float:
    best, end = float("inf"), time.perf_counter() + SECONDS
    while (started := time.perf_counter()) < end:
        layer(x)
        best = min(best, time.perf_counter() - started)
    return best * 1000


def main(size: int) -> None:
    print(f"{native.kernel()}, {torch.get_num_threads()} threads, {size} x {size}\n")
    print(f"| | {' | '.join(map(str, TOKENS))} |")
    print("| --- |" + " --- |" * len(TOKENS))
    for name, layer in layers(size):
        times = [milliseconds(layer, torch.randn(count, size).bfloat16()) for count in TOKENS]
        print(f"| {name} | {' | '.join(f'{each:.2f}' for each in times)} |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
