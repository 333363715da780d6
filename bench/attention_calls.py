"""What attention takes for one decoded token on a CPU, with writing to the KV cache: by vLLM's two
operations, and by the one that keeps its views of the cache (``patches/cpu/attention.py``), by
turns on one thread, for the layers of the model of ``half_billion.py``. What vLLM's model calls
them through is not counted: two operations of Python's, and one.

    OMP_NUM_THREADS=1 PYTHON bench/attention_calls.py

Before each call as many bytes are read as a layer's weights have: they empty the caches of the
processor. The CPU time of the thread counts, so that other programs matter less.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from vllm.v1.attention.backends import cpu_attn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "tests"))

import attention_layers
from attention_layers import BLOCK, SIZE
from vllm_bridge.patches.cpu import amx
from vllm_bridge.patches.cpu import attention as patch

LAYERS, HEADS, KV_HEADS, CONTEXT = 28, 20, 4, 64
WEIGHTS = 10_000_000
ROUNDS = 25


class Attention:
    """That of each layer."""

    def __init__(self) -> None:
        dtype = torch.bfloat16
        self.layer = attention_layers.layer(1.0, 1.0)
        self.layers = [attention_layers.implementation() for _ in range(LAYERS)]
        self.caches = [
            torch.zeros(8, KV_HEADS, BLOCK, 2 * SIZE, dtype=dtype) for _ in range(LAYERS)
        ]
        self.slots = torch.tensor([CONTEXT - 1])
        self.metadata = attention_layers.metadata(
            *([0, 1], [CONTEXT], (HEADS, KV_HEADS)),
            *(torch.zeros(1, 8), self.slots, self.layer.isa),
        )
        self.query, self.output = (torch.randn(1, HEADS, SIZE, dtype=dtype) for _ in range(2))
        self.key, self.value = (torch.randn(1, KV_HEADS, SIZE, dtype=dtype) for _ in range(2))

    def write(self, index: int) -> None:
        cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update(
            *(self.layers[index], self.layer, self.key, self.value),
            *(self.caches[index], self.slots),
        )

    def attend(self, by: Callable[..., torch.Tensor], index: int) -> None:
        by(
            *(self.layers[index], self.layer, self.query, self.key, self.value),
            *(self.caches[index], self.metadata, self.output),
        )


def main() -> None:
    torch.set_num_threads(1)
    amx.apply()
    attention = Attention()
    weights = torch.zeros(LAYERS, WEIGHTS, dtype=torch.uint8).view(torch.int64)
    vllms = cpu_attn.CPUAttentionBackendImpl.forward
    ours = patch.attending(vllms)
    ways: dict[str, Callable[[int], None]] = {
        "vLLM's write to the KV cache": attention.write,
        "vLLM's attention": lambda layer: attention.attend(vllms, layer),
        "both in one, views kept": lambda layer: attention.attend(ours, layer),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            spent = dict.fromkeys(ways, 0.0)
            for layer in range(LAYERS):
                for name, call in ways.items():
                    weights[layer].sum()
                    began = time.thread_time()
                    call(layer)
                    spent[name] += 1000 * (time.thread_time() - began)
            for name, milliseconds in spent.items():
                taken[name].append(milliseconds)
    print("| | ms of a token |\n| --- | --- |")
    for name, each in taken.items():
        print(f"| {name} | {statistics.median(each):.2f} |")


if __name__ == "__main__":
    main()
