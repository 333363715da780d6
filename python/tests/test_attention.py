"""Attention on CPUs that writes to the KV cache by views that are kept, beside vLLM's own."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
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


class Layer:
    """A layer of attention, patched or not, which counts the calls that are left to vLLM."""

    def __init__(self, is_patched: bool, **settings: Any) -> None:
        self.layer = attention_layers.layer(2.0, 0.5)
        self.impl = attention_layers.implementation(**settings)
        self.left: list[str] = []
        self._write = self._counted(cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update)
        # vLLM's method, patched in this process or not.
        forward = cpu_attn.CPUAttentionBackendImpl.forward
        own = self._counted(getattr(forward, "__wrapped__", forward))
        self.attend = patch.attending(own) if is_patched else own
        self.is_patched = is_patched
        self.impl.do_kv_cache_update = functools.partial(self._write, self.impl)
        self.new_cache()

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            self.left.append(method.__name__)
            return method(*args, **named)

        return counted

    def new_cache(self) -> None:
        self.cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * SIZE, dtype=torch.bfloat16)

    def run(self, starts: list[int], lengths: list[int], padding: int) -> torch.Tensor:
        """Attends to the last tokens of each sequence, whose tokens are all written before.

        Args:
            starts: of each sequence among the queries, and their number
            padding: how many tokens more the tensors have
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
        )
        metadata = attention_layers.metadata(
            *(starts, lengths, (HEADS, KV_HEADS), table, slots),
            *(self.layer.isa, self.impl.sliding_window),
        )
        if not self.is_patched:
            self._write(self.impl, self.layer, key[:count], value[:count], self.cache, slots)
        answer: torch.Tensor = self.attend(
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
def test_attention_that_writes_is_vllms(settings: dict[str, Any]) -> None:
    ours, plain = Layer(True, **settings), Layer(False, **settings)
    for step in STEPS:
        expected = plain.run(*step)
        assert torch.equal(ours.run(*step), expected)
        assert torch.equal(ours.cache, plain.cache)
        assert expected.any()
    assert ours.left == []


def test_a_layer_that_is_given_another_cache_makes_other_views() -> None:
    ours, plain = Layer(True), Layer(False)
    for layer in (ours, plain):
        layer.run(*STEPS[0])
        layer.new_cache()
    assert torch.equal(ours.run(*STEPS[0]), plain.run(*STEPS[0]))
    assert torch.equal(ours.cache, plain.cache)
    assert ours.cache.any()


@pytest.mark.parametrize(
    "settings", [{"sinks": torch.zeros(HEADS)}, {"kv_cache_dtype": "bfloat16"}]
)
def test_what_is_rare_is_left_to_vllm(settings: dict[str, Any]) -> None:
    layer = Layer(True, **settings)
    written: list[str] = []
    layer.impl.do_kv_cache_update = lambda *_args: written.append("written")
    patch.attending(lambda *_args, **_named: layer.left.append("forward"))(
        *(layer.impl, layer.layer, *[torch.ones(1)] * 3),
        *(layer.cache, SimpleNamespace(slot_mapping=None), torch.ones(1)),
    )
    assert (written, layer.left) == (["written"], ["forward"])


@pytest.mark.parametrize("settings", [{}, {"sinks": torch.zeros(HEADS)}])
def test_a_layer_that_shares_the_cache_of_another_writes_nothing(settings: dict[str, Any]) -> None:
    layer = Layer(True, kv_sharing_target_layer_name="another", **settings)
    layer.run(*STEPS[0])
    assert not layer.cache.any()


def test_without_metadata_as_while_a_model_is_measured_nothing_is_computed() -> None:
    layer, output = Layer(True), torch.ones(1, HEADS, SIZE)
    given = (layer.impl, layer.layer, output, output, output, layer.cache, None, output)
    assert layer.attend(*given) is output
    assert layer.left == ["forward"]
    assert output.eq(1).all()


def test_scaled_outputs_are_left_to_vllm() -> None:
    layer, output = Layer(True), torch.ones(1, HEADS, SIZE)
    given = (layer.impl, layer.layer, output, output, output, layer.cache, None, output)
    with pytest.raises(NotImplementedError, match="output quantization"):
        layer.attend(*given, torch.ones(1))


@pytest.mark.parametrize("is_known", [True, False])
def test_where_the_operations_take_other_arguments_all_is_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    replaced: list[str] = []
    monkeypatch.setattr(patch, "replace", lambda _owner, name, _make: replaced.append(name))
    backend = cpu_attn.CPUAttentionBackend
    monkeypatch.setattr(backend, "forward_includes_kv_cache_update", False)
    if not is_known:
        monkeypatch.setattr(patch, "WRITE", (*patch.WRITE, "another"))
    patch.apply()
    assert backend.forward_includes_kv_cache_update is is_known
    assert replaced == ["forward"] * is_known
