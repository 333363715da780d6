import importlib.metadata
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

import vllm_bridge
from vllm_bridge import plugin

PYTHON = Path(__file__).resolve().parents[1]
PYPROJECT = (PYTHON.parent / "pyproject.toml").read_text(encoding="utf-8")


def test_the_distribution_beside_the_code_agrees_with_pyproject() -> None:
    (folder,) = PYTHON.glob("*.dist-info")
    distribution = importlib.metadata.PathDistribution(folder)
    assert folder.name == f"vllm_bridge-{vllm_bridge.__version__}.dist-info"
    for name, key in [
        ("Name", "name"),
        ("Version", "version"),
        ("Summary", "description"),
        ("Requires-Python", "requires-python"),
        ("License-Expression", "license"),
    ]:
        declared = re.search(rf'^{key} = "(.*)"$', PYPROJECT, re.MULTILINE)
        assert declared is not None
        assert distribution.metadata[name] == declared[1]
    assert distribution.version == vllm_bridge.__version__


def test_vllm_finds_the_plugin() -> None:
    (entry_point,) = (
        entry_point
        for entry_point in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry_point.name == "vllm_bridge"
    )
    assert entry_point.load() is plugin.register
    assert f'vllm_bridge = "{entry_point.value}"' in PYPROJECT


def test_readers_nap_where_cores_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SpinCondition.wait
    naps: list[float] = []
    waits: list[int | None] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    monkeypatch.setattr(SpinCondition, "wait", lambda _self, timeout_ms: waits.append(timeout_ms))

    monkeypatch.setattr(plugin, "few_cores", lambda: False)
    plugin.register()
    assert SpinCondition.wait.__module__ == __name__

    monkeypatch.setattr(plugin, "few_cores", lambda: True)
    plugin.register()
    patched = SpinCondition.wait
    plugin.register()
    assert SpinCondition.wait is patched

    busy = SimpleNamespace(last_read=time.monotonic(), busy_loop_s=60)
    patched(busy)
    assert naps == [plugin.NAP_SECONDS]
    assert waits == []

    idle = SimpleNamespace(last_read=time.monotonic() - 10, busy_loop_s=1)
    patched(idle, 5)
    assert waits == [5]
    assert len(naps) == 1
    monkeypatch.undo()
    assert SpinCondition.wait is original


def test_tokens_without_an_adapter_get_none() -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    plugin.register()
    plugin.register()
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


def test_each_prompt_is_scored_with_its_own_adapter() -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    plugin.register()
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
    score = plugin._prompt_by_prompt(original)
    # Of the last there is more to come.
    found = score(runner, torch.ones(9, 4), lengths | {"c": 3})
    assert found == {"a": [3.0] * 3, "b": [0.0] * 2, "c": [2.0] * 4}
    assert runner.num_prompt_logprobs is asked
    assert asked == {"c": 1, "preempted": 1}
    assert wrapper.sampler_indices.tolist() == before == [1, -1, 0]
