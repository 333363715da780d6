"""What the products of one decoded token take, and how much of it is ggml's: on the layers of the
model of ``half_billion.py`` as Q4_K_M has them, with random weights, by turns on one thread.

    OMP_NUM_THREADS=1 PYTHON bench/gguf_calls.py

It counts the CPU time of the thread, so that other programs on the machine matter less.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from vllm_bridge.quantization.gguf import ggml, kernels, operation
from vllm_bridge.quantization.gguf.types import TYPES

Q4_K, Q6_K = 12, 14
HIDDEN, INNER, LAYERS, VOCABULARY = 1280, 3584, 28, 2048
ROUNDS = 40


class Layer:
    def __init__(self, columns: int, *parts: tuple[int, int], is_gated: bool = False) -> None:
        """
        Args:
            parts: type and rows of each
            is_gated: whether the second one multiplies what SwiGLU makes of the first one's product
        """
        self.x = torch.randn(1, columns, dtype=torch.bfloat16)
        self.weights = []
        for index, (type, rows) in enumerate(parts):
            packing = TYPES[type]
            width = (parts[0][1] // 2 if is_gated and index else columns) // packing.weights
            # Any bytes are weights; without the highest bits no scale is huge.
            self.weights.append(torch.randint(0, 60, (rows, width * packing.size)).byte())
        self.types = [
            kernels.repack(weight, type)
            for weight, (type, _) in zip(self.weights, parts, strict=True)
        ]
        self.is_gated = is_gated

    def by(self, matmul: Callable[..., torch.Tensor], pair: Callable[..., torch.Tensor]) -> None:
        packed = zip(self.weights, self.types, strict=True)
        if len(self.weights) == 1:
            matmul(self.x, *next(packed), False)
        else:
            pair(self.x, *next(packed), *next(packed), self.is_gated)

    def by_ggml(self) -> None:
        self.graph.compute()

    def point(self) -> None:
        """Has a graph of its own, to be computed with nothing around it."""
        kind = operation.GATED if self.is_gated else len(self.weights) - 1
        shapes = [(type, len(each)) for each, type in zip(self.weights, self.types, strict=True)]
        self.graph = ggml._Products(ggml.library(), kind, 1, self.x.shape[1], *shapes)
        for tensor, weight in zip(self.graph.weights, self.weights, strict=True):
            tensor.data = weight.data_ptr()


def layers() -> list[Layer]:
    made = []
    for index in range(LAYERS):
        # Half of the values and downs have more bits, as llama-quantize chooses.
        more = Q6_K if index % 2 else Q4_K
        qkv = ((Q4_K, 1536), (more, 256)) if more != Q4_K else ((Q4_K, 1792),)
        made += [
            Layer(HIDDEN, *qkv),
            Layer(HIDDEN, (Q4_K, HIDDEN)),
            Layer(HIDDEN, (Q4_K, 2 * INNER), (more, HIDDEN), is_gated=True),
        ]
    return [*made, Layer(HIDDEN, (Q6_K, VOCABULARY))]


def main() -> None:
    torch.set_num_threads(1)
    model = layers()
    for layer in model:
        layer.point()
    operations = torch.ops.vllm_bridge
    ways: dict[str, Callable[[Layer], None]] = {
        "ggml alone": Layer.by_ggml,
        "the compiled operations": lambda layer: layer.by(
            operations.gguf_matmul.default, operations.gguf_pair.default
        ),
        "Python": lambda layer: layer.by(
            operations.gguf_matmul_any.default, operations.gguf_pair_any.default
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.thread_time()
            for layer in model:
                way(layer)
            taken[name].append(1000 * (time.thread_time() - began))
    print("| by | ms of a token | more than ggml alone |\n| --- | --- | --- |")
    for name, each in taken.items():
        more = statistics.median(
            one - other for one, other in zip(each, taken["ggml alone"], strict=True)
        )
        print(f"| {name} | {statistics.median(each):.2f} | {more:.2f} |")


if __name__ == "__main__":
    main()
