"""The changes that are made of vLLM."""

import functools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.platforms import current_platform

from vllm_bridge import VLLM_VERSIONS, patches
from vllm_bridge.patches import adapterless, spinning
from vllm_bridge.patches.cpu import amx, logprobs, prompt_logprobs, stages


class Theirs:
    def double(self, number: int) -> int:
        return 2 * number

    @staticmethod
    def half(number: int) -> int:
        return number // 2


def and_one(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def wrapped(*args: int) -> int:
        return original(*args) + 1

    return wrapped


def and_ten(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def wrapped(*args: int) -> int:
        return original(*args) + 10

    return wrapped


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> type[Theirs]:
    monkeypatch.setattr(patches, "touched", set())
    return type("Theirs", (Theirs,), {"half": staticmethod(Theirs.half)})


def test_a_function_is_replaced_once_by_each_patch(theirs: type[Theirs]) -> None:
    for _ in range(2):
        patches.replace(theirs, "double", and_one)
        patches.replace(theirs, "double", and_ten)
        patches.replace(theirs, "half", functools.partial(and_one))
    assert theirs().double(2) == 15
    assert (theirs.half(4), theirs().half(4)) == (3, 3)
    assert Theirs().double(2) == 4
    assert patches.touched == {f"{__name__}.Theirs.double", f"{__name__}.Theirs.half"}


def test_what_is_added_is_not_added_again(theirs: type[Theirs]) -> None:
    assert patches.add(theirs, "triple", lambda _self, number: 3 * number)
    assert not patches.add(theirs, "triple", lambda _self, number: 4 * number)
    assert theirs().triple(2) == 6  # type: ignore[attr-defined]
    assert patches.touched == {f"{__name__}.Theirs"}


def test_each_patch_says_what_it_mends_and_touches() -> None:
    every = list(patches.every())
    assert {"adapterless", "ranks", "fp8", "experts"} <= {
        patch.__name__.rpartition(".")[2] for patch in every
    }
    for patch in every:
        assert patch.__doc__
        assert set(VLLM_VERSIONS) <= set(patch.SEEN), patch
        assert isinstance(patch.TOUCHES, dict), patch
        assert all(isinstance(names, tuple) for names in patch.TOUCHES.values()), patch


def test_patches_touch_what_they_say() -> None:
    patches.apply()
    declared = {
        f"{module}.{name}"
        for patch in patches.every()
        for module, names in patch.TOUCHES.items()
        for name in names
    }
    ours = {name for name in patches.touched if name.startswith("vllm")}
    assert ours
    assert ours <= declared


def test_on_other_devices_nothing_is_done_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[str] = []
    for patch in patches.every():
        monkeypatch.setattr(patch, "apply", functools.partial(applied.append, patch.__name__))
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    patches.apply()
    assert "vllm_bridge.patches.ranks" in applied
    assert not [name for name in applied if ".cpu." in name]


@pytest.mark.parametrize("is_first", [True, False])
def test_later_stages_of_a_pipeline_have_room(
    monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    group = SimpleNamespace(is_first_rank=is_first)
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: group)
    runner = SimpleNamespace(
        model=SimpleNamespace(make_empty_intermediate_tensors=lambda **sizes: sizes),
        model_config=SimpleNamespace(dtype="bf16"),
        max_num_tokens=64,
        device="cpu",
        intermediate_tensors=None,
    )
    stages.making_room(lambda _runner: None)(runner)
    room = {"batch_size": 64, "dtype": "bf16", "device": "cpu"}
    assert runner.intermediate_tensors == (None if is_first else room)


def test_readers_nap_where_cores_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SpinCondition.wait
    naps: list[float] = []
    waits: list[int | None] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    monkeypatch.setattr(SpinCondition, "wait", lambda _self, timeout_ms: waits.append(timeout_ms))

    monkeypatch.setattr(spinning, "few_cores", lambda: False)
    spinning.apply()
    assert SpinCondition.wait.__module__ == __name__

    monkeypatch.setattr(spinning, "few_cores", lambda: True)
    spinning.apply()
    patched = SpinCondition.wait
    spinning.apply()
    assert SpinCondition.wait is patched

    busy = SimpleNamespace(last_read=time.monotonic(), busy_loop_s=60)
    patched(busy)
    assert naps == [spinning.NAP_SECONDS]
    assert waits == []

    idle = SimpleNamespace(last_read=time.monotonic() - 10, busy_loop_s=1)
    patched(idle, 5)
    assert waits == [5]
    assert len(naps) == 1
    monkeypatch.undo()
    assert SpinCondition.wait is original


@pytest.mark.parametrize(
    ("granted", "limit", "used"),
    [
        (True, "", True),
        (True, "default", True),
        (True, "AVX10_1_512_AMX", True),
        (True, "AVX512_CORE_BF16", False),
        (False, "", False),
    ],
)
def test_amx_is_used_where_kernel_and_user_let_it(
    granted: bool, limit: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: granted)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    amx.apply()
    assert torch.cpu._is_amx_tile_supported() is used
    assert torch.cpu._is_amx_fp16_supported() is used


def test_tokens_without_an_adapter_get_none() -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    adapterless.apply()
    adapterless.apply()
    assert punica_cpu.bgmv_expand is lora_ops.bgmv_expand
    assert punica_cpu.bgmv_expand_slice is lora_ops.bgmv_expand_slice

    # Two adapters that multiply by 2 and by 3; tokens with the first, with none, with the second.
    weights = torch.stack([torch.eye(4) * 2, torch.eye(4) * 3]).unsqueeze(1)
    indices = torch.tensor([0, -1, 1])
    inputs = torch.ones(3, 4)
    output = torch.ones(3, 4)
    lora_ops.bgmv_expand(inputs, weights, output, indices, add_inputs=True)
    assert output[:, 0].tolist() == [3, 1, 4]
    output = torch.ones(3, 6)
    lora_ops.bgmv_expand_slice(inputs, weights, output, indices, 2, 4, add_inputs=True)
    assert output.tolist() == [[1, 1, 3, 3, 3, 3], [1] * 6, [1, 1, 4, 4, 4, 4]]
    # What a prefill uses comes to the same.
    output = torch.ones(3, 4)
    lengths = torch.ones(3, dtype=torch.long)
    lora_ops.sgmv_expand(inputs, weights, output, None, lengths, indices, 3, 1, 3, True)
    assert output[:, 0].tolist() == [3, 1, 4]


def test_ranks_are_counted_without_a_compiler() -> None:
    from vllm.v1.sample import sampler

    logprobs.apply()
    count = sampler.batched_count_greater_than
    assert not hasattr(count, "_torchdynamo_orig_callable")
    rows = torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -1.0, -3.0]])
    assert count(rows, torch.tensor([[-2.0], [-3.0]])).tolist() == [2, 3]


def test_each_prompt_is_scored_with_its_own_adapter() -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    adapterless.apply()
    # Prompts of three, two and four tokens: with the second adapter, with none, with the first.
    wrapper = PunicaWrapperCPU(16, 4, "cpu")
    mapping = LoRAMapping((2, 2, 2, 0, 0, 1, 1, 1, 1), (2, 0, 1), is_prefill=True)
    wrapper.update_metadata(mapping, [1, 2], 2, 4)
    before = wrapper.sampler_indices.tolist()
    # They multiply by 2 and by 3.
    first = torch.eye(4).repeat(2, 1, 1, 1)
    second = torch.stack([torch.eye(4) * 2, torch.eye(4) * 3]).unsqueeze(1)
    lengths = {"a": 3, "b": 2, "c": 4}

    def original(runner: Any, hidden: Any, scheduled: dict[str, int]) -> dict[str, Any]:
        found = {}
        for name in list(runner.num_prompt_logprobs):
            start = runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]
            rows = hidden[start : start + lengths[name]]
            logits = torch.zeros(len(rows), 4)
            wrapper.add_lora_logits(logits, rows, first, second, 1.0)
            found[name] = logits[:, 0].tolist()
            if scheduled[name] == lengths[name]:
                del runner.num_prompt_logprobs[name]
        return found

    asked = {"c": 1, "a": 0, "b": 2, "preempted": 1}
    runner = SimpleNamespace(
        lora_config=object(),
        lora_manager=SimpleNamespace(
            _adapter_manager=SimpleNamespace(punica_wrapper_mapping={"": wrapper})
        ),
        num_prompt_logprobs=asked,
        input_batch=SimpleNamespace(req_id_to_index={"a": 0, "b": 1, "c": 2}),
        query_start_loc=SimpleNamespace(np=[0, 3, 5, 9]),
    )
    score = prompt_logprobs.prompt_by_prompt(original)
    # Of the last there is more to come.
    found = score(runner, torch.ones(9, 4), lengths | {"c": 3})
    assert found == {"a": [3.0] * 3, "b": [0.0] * 2, "c": [2.0] * 4}
    assert runner.num_prompt_logprobs is asked
    assert asked == {"c": 1, "preempted": 1}
    assert wrapper.sampler_indices.tolist() == before == [1, -1, 0]
