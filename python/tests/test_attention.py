"""Attention on CPUs with views of the KV cache that are kept, beside vLLM's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends import cpu_attn

import attention_layers
from attention_layers import BLOCK, SIZE
from vllm_bridge.patches.cpu import attention as patch

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(),
    reason="the operations that are compared are only in vLLM's build for CPUs",
)

HEADS, KV_HEADS, BLOCKS = 4, 2, 4


def own(name: str) -> Callable[..., Any]:
    """vLLM's method, patched or not."""
    method = getattr(cpu_attn.CPUAttentionBackendImpl, name)
    found: Callable[..., Any] = getattr(method, "__wrapped__", method)
    return found


class Layer:
    """A layer of attention, which counts the calls that are left to vLLM."""

    def __init__(self, **settings: Any) -> None:
        self.layer = attention_layers.layer(2.0, 0.5)
        self.impl = attention_layers.implementation(**settings)
        self.left: list[str] = []
        self._write = patch.writing(self._counted("do_kv_cache_update"))
        self._attend = patch.attending(self._counted("forward"))
        self.new_cache()

    def _counted(self, name: str) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            self.left.append(name)
            return own(name)(*args, **named)

        return counted

    def new_cache(self) -> None:
        self.cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * SIZE, dtype=torch.bfloat16)

    def run(self, starts: list[int], lengths: list[int], padding: int, **ways: Any) -> torch.Tensor:
        """Attends to the last tokens of each sequence, whose tokens are all written before.

        Args:
            starts: of each sequence among the queries, and their number
            padding: how many tokens more the tensors have
            ways: by which functions, where not by those with views that are kept
        """
        torch.manual_seed(len(lengths))
        count = starts[-1]
        query, key, value, output = (
            torch.randn(count + padding, heads, SIZE, dtype=torch.bfloat16)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        )
        output.zero_()
        table = torch.tensor([[2 * index, 2 * index + 1] for index in range(len(lengths))])
        slots = torch.tensor(
            [
                int(table[index, place // BLOCK]) * BLOCK + place % BLOCK
                for index, length in enumerate(lengths)
                for place in range(length - starts[index + 1] + starts[index], length)
            ]
            + [-1] * padding
        )
        metadata = attention_layers.metadata(
            *(starts, lengths, (HEADS, KV_HEADS), table, slots),
            *(self.layer.isa, self.impl.sliding_window),
        )
        write, attend = ways.get("write", self._write), ways.get("attend", self._attend)
        write(self.impl, self.layer, key, value, self.cache, slots)
        answer: torch.Tensor = attend(
            self.impl, self.layer, query, key, value, self.cache, metadata, output
        )
        assert answer is output
        return answer


STEPS = [
    ([0, 5], [5], 0),  # a prompt
    ([0, 1], [6], 0),
    ([0, 1, 8], [7, 7], 3),
    ([0, 1, 2], [8, 130], 0),
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sliding_window": 4},
        {"logits_soft_cap": 3.0},
        {"alibi_slopes": torch.arange(HEADS, dtype=torch.float32) / 8},
    ],
)
def test_attention_with_views_that_are_kept_is_vllms(settings: dict[str, Any]) -> None:
    kept, plain = Layer(**settings), Layer(**settings)
    for step in STEPS:
        expected = plain.run(*step, write=own("do_kv_cache_update"), attend=own("forward"))
        assert torch.equal(kept.run(*step), expected)
        assert torch.equal(kept.cache, plain.cache)
        assert expected.any()
    assert kept.left == []


def test_a_layer_that_is_given_another_cache_makes_other_views() -> None:
    kept, plain = Layer(), Layer()
    for layer in (kept, plain):
        layer.run(*STEPS[0])
        layer.new_cache()
    expected = plain.run(*STEPS[0], write=own("do_kv_cache_update"), attend=own("forward"))
    assert torch.equal(kept.run(*STEPS[0]), expected)
    assert torch.equal(kept.cache, plain.cache)
    assert kept.cache.any()


def test_what_is_rare_is_left_to_vllm() -> None:
    layer = Layer(sinks=torch.zeros(HEADS))
    layer.run(*STEPS[0])
    assert layer.left == ["do_kv_cache_update", "forward"]
    cached = Layer(kv_cache_dtype="bfloat16")
    patch.writing(lambda *_args: cached.left.append("written"))(
        cached.impl, cached.layer, None, None, cached.cache, None
    )
    assert cached.left == ["written"]


def test_without_metadata_as_while_a_model_is_measured_nothing_is_computed() -> None:
    layer, output = Layer(), torch.ones(1, HEADS, SIZE)
    given = (layer.impl, layer.layer, output, output, output, layer.cache, None, output)
    assert layer._attend(*given) is output
    assert layer.left == ["forward"]
    assert output.eq(1).all()


def test_scaled_outputs_are_left_to_vllm() -> None:
    layer, output = Layer(), torch.ones(1, HEADS, SIZE)
    given = (layer.impl, layer.layer, output, output, output, layer.cache, None, output)
    with pytest.raises(NotImplementedError, match="output quantization"):
        layer._attend(*given, torch.ones(1))


def test_operations_that_take_other_arguments_are_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert patch.is_known()
    replaced: list[str] = []
    monkeypatch.setattr(patch, "replace", lambda _owner, name, _make: replaced.append(name))
    patch.apply()
    assert replaced == ["do_kv_cache_update", "forward"]
    monkeypatch.setattr(patch, "WRITE", (*patch.WRITE, "another"))
    patch.apply()
    assert len(replaced) == 2
