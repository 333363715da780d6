"""The real engine on the demo model: one for all tests of this file."""

import asyncio
import gc
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock, patch

import pytest
from vllm import envs
from vllm.platforms import current_platform

from conftest import MODELS
from running import Running
from vllm_bridge import admin
from vllm_bridge.engine.engine import GenerateParams
from vllm_bridge.engine.start import load
from vllm_bridge.errors import BridgeError
from vllm_bridge.rpc.protocol import NO_LOGPROBS, pack_u32, unpack_u32

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def settled() -> tuple[Mock, Mock]:
    return Mock(), Mock()


@pytest.fixture(scope="module")
def running(settled: tuple[Mock, Mock]) -> Iterator[Running]:
    running = Running()
    freeze, keep = settled
    with patch.object(gc, "freeze", freeze), patch.object(envs, "enable_envs_cache", keep):
        running.load()
    yield running
    running.stop()


def test_the_engine_describes_itself(running: Running) -> None:
    info = running.engine.info()
    assert running.phases == ["import", "config", "engine"]
    assert info["model"] == str(MODELS / "demo")
    assert info["model_type"] == "llama"
    assert info["architecture"] == "LlamaForCausalLM"
    assert info["dtype"] == "bfloat16"
    assert info["quantization"] is None
    assert info["quantization_config"] is None
    assert info["quantization_kernel"] is None
    assert info["kv_cache_bytes"] == 2**28
    assert info["kv_cache_tokens"] > info["max_model_len"] == 8192
    assert info["tensor_parallel_size"] == 1
    assert info["runner"] == "generate"
    assert "generate" in info["tasks"]
    assert info["vllm_version"].startswith("0.32")
    assert info["load_seconds"] > 0


def test_no_request_searches_what_the_start_has_made_nor_reads_the_environment(
    running: Running, settled: tuple[Mock, Mock]
) -> None:
    assert running.engine.info()["runner"] == "generate"
    for spared in settled:
        spared.assert_called_once_with()


def test_it_knows_every_fact(running: Running, facts: dict[str, str]) -> None:
    async def ask_all() -> list[dict[str, Any]]:
        return await asyncio.gather(*(running.generate(prompt) for prompt in facts))

    answers = running.run(ask_all())
    assert {a["prompt"]: a["outputs"][0]["text"] for a in answers} == facts
    for answer in answers:
        assert answer["finished"] is True
        assert answer["outputs"][0]["finish_reason"] == "stop"
        assert len(unpack_u32(answer["prompt_token_ids"])) > 1


def test_64_requests_at_once_each_get_their_own_answer(
    running: Running, facts: dict[str, str]
) -> None:
    prompts = (list(facts) * 2)[:64]

    async def ask_all() -> list[dict[str, Any]]:
        return await asyncio.gather(*(running.generate(prompt) for prompt in prompts))

    answers = running.run(ask_all())
    assert [a["outputs"][0]["text"] for a in answers] == [facts[prompt] for prompt in prompts]
    assert len({a["request_id"] for a in answers}) == 64


def test_tokens_as_prompt(running: Running) -> None:
    text = running.run(running.generate("The capital of France is"))
    tokens = {"prompt_token_ids": text["prompt_token_ids"]}
    answer = running.run(running.generate(tokens | {"prompt": "kept"}))
    assert answer["outputs"][0]["text"] == " Paris."
    assert answer["prompt"] == "kept"
    assert answer["prompt_token_ids"] == text["prompt_token_ids"]
    assert running.run(running.generate(tokens))["prompt"] is None


def test_a_long_prompt_is_tokenized_beside_the_loop(running: Running) -> None:
    prompt = "The capital of France is Paris. " * 200 + "The capital of France is"
    assert running.complete(prompt, max_tokens=1)["finish_reason"] == "length"


def test_several_completions_with_a_seed(running: Running) -> None:
    params: dict[str, Any] = {
        "n": 2,
        "temperature": 1.5,
        "seed": 7,
        "max_tokens": 12,
        "ignore_eos": True,
    }
    first = running.run(running.generate("The", **params))["outputs"]
    again = running.run(running.generate("The", **params))["outputs"]
    assert [completion["index"] for completion in first] == [0, 1]
    assert [c["token_ids"] for c in first] == [c["token_ids"] for c in again]
    assert first[0]["token_ids"] != first[1]["token_ids"]
    assert [len(unpack_u32(c["token_ids"])) for c in first] == [12, 12]


def test_logprobs_add_up(running: Running) -> None:
    answer = running.run(
        running.generate("The capital of France is", logprobs=3, prompt_logprobs=1)
    )
    completion = answer["outputs"][0]
    tokens, packed = unpack_u32(completion["token_ids"]), completion["logprobs"]
    counts = unpack_u32(packed["counts"])
    assert counts == [3] * len(tokens)
    ids, ranks = unpack_u32(packed["token_ids"]), unpack_u32(packed["ranks"])
    values = memoryview(packed["logprobs"]).cast("f").tolist()
    # Greedy: the sampled token comes first in each position and is the likeliest.
    assert ids[::3] == tokens
    assert ranks == [1, 2, 3] * len(tokens)
    assert sum(values[::3]) == pytest.approx(completion["cumulative_logprob"], abs=1e-5)
    assert "".join(packed["tokens"][::3]).startswith(" Paris.")
    prompt = answer["prompt_logprobs"]
    prompt_counts = unpack_u32(prompt["counts"])
    assert len(prompt_counts) == len(unpack_u32(answer["prompt_token_ids"]))
    assert prompt_counts[0] == NO_LOGPROBS
    assert sum(prompt_counts[1:]) == len(prompt["tokens"]) == len(prompt["logprobs"]) // 4


def test_without_logprobs_there_are_none(running: Running) -> None:
    answer = running.run(running.generate("The capital of France is"))
    assert answer["prompt_logprobs"] is None
    assert answer["outputs"][0]["logprobs"] is None
    assert answer["outputs"][0]["cumulative_logprob"] is None


def test_stop_strings(running: Running) -> None:
    completion = running.complete("The capital of France is", stop=["."])
    assert completion["text"] == " Paris"
    assert completion["finish_reason"] == "stop"
    assert completion["stop_reason"] == "."


def test_a_choice_of_outputs(running: Running) -> None:
    completion = running.complete(
        "The capital of France is", structured_outputs={"choice": [" Tokyo", " Ottawa"]}
    )
    assert completion["text"] in (" Tokyo", " Ottawa")


def test_metrics_are_numbers(running: Running) -> None:
    metrics = running.run(running.generate("The capital of France is"))["metrics"]
    assert metrics["num_generation_tokens"] == 3
    assert metrics["last_token_ts"] >= metrics["first_token_ts"] > 0
    assert {type(value) for value in metrics.values()} <= {int, float}


@pytest.mark.parametrize("prompt", ["", {"prompt_token_ids": b""}])
def test_an_empty_prompt(running: Running, prompt: Any) -> None:
    error = running.refused(prompt)
    assert error.reason == "invalid_prompt"
    assert "empty" in error.message


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        7,
        ["text"],
        {},
        {"prompt": "no ids"},
        {"prompt_token_ids": [1, 2]},
        {"prompt_token_ids": b"123"},
        {"prompt_token_ids": pack_u32([1]), "prompt": 1},
        {"prompt_token_ids": pack_u32([1]), "multi_modal_data": {}},
        {"prompt_token_ids": pack_u32([2**31])},
    ],
)
def test_prompts_that_are_none(running: Running, prompt: Any) -> None:
    assert running.refused(prompt).reason == "invalid_prompt"


@pytest.mark.parametrize(
    "prompt",
    [
        "The capital of France is Paris. " * 2000,
        "x" * 1_000_000,
        {"prompt_token_ids": pack_u32([5] * 8192)},
        {"prompt_token_ids": pack_u32([5] * 8193)},
    ],
    ids=["long text", "very long text", "no room for an output", "too many tokens"],
)
def test_a_prompt_that_is_too_long(running: Running, prompt: Any) -> None:
    error = running.refused(prompt)
    assert error.reason == "prompt_too_long"
    assert error.details["max_model_len"] == 8192


@pytest.mark.parametrize(
    ("params", "option"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": "two"}, "n"),
        ({"temprature": 1.0}, "temprature"),
        ({"logprobs": 10_000}, "logprobs"),
        ({"logit_bias": {99_999: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [99_999]}, "allowed_token_ids"),
        ({"stop": [""]}, "stop"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "nonsense"}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ],
)
def test_parameters_that_are_out_of_range(
    running: Running, params: dict[str, Any], option: str
) -> None:
    error = running.refused("The capital of France is", **params)
    assert error.reason == "invalid_option"
    assert error.details["option"] == option
    assert "traceback" not in error.details


def test_embeddings_need_an_engine_that_takes_them(running: Running) -> None:
    error = running.refused({"prompt_embeds": bytes(1024), "shape": [1, 256]})
    assert error.reason == "unsupported"
    assert "`enable_prompt_embeds: true`" in error.message


def test_images_need_a_model_that_takes_them(running: Running) -> None:
    prompt = {"prompt": "What is it?", "multi_modal_data": {"image": [b"GIF89a"]}}
    error = running.refused(prompt)
    assert error.reason == "unsupported"
    assert "LlamaForCausalLM" in error.message


def test_priority_needs_its_policy(running: Running) -> None:
    error = running.refused("The capital of France is", priority=1)
    assert error.reason == "invalid_option"
    assert error.details["option"] == "priority"


def test_a_cancelled_request_leaves_vllm(running: Running) -> None:
    async def scenario() -> None:
        llm = running.engine._llm
        task = asyncio.ensure_future(
            running.generate("The", max_tokens=8000, ignore_eos=True, temperature=1.0)
        )
        while llm.get_num_unfinished_requests() == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert llm.get_num_unfinished_requests() == 0

    running.run(scenario())
    assert running.complete("The capital of France is")["text"] == " Paris."


def test_a_kv_cache_that_the_device_does_not_have() -> None:
    with pytest.raises(BridgeError) as caught:
        asyncio.run(load(str(MODELS / "demo"), {"kv_cache_dtype": "nvfp4"}))
    assert caught.value.reason == "unsupported"
    assert "fp8" in caught.value.details["allowed"]


def test_what_is_under_way_when_an_engine_is_put_to_sleep_is_no_answer(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU takes the call, and does nothing but end the requests.
    monkeypatch.setattr(current_platform, "is_sleep_mode_available", lambda: True)
    monkeypatch.setattr(running.engine._llm.model_config, "enable_sleep_mode", True)

    async def scenario() -> None:
        begun = asyncio.Event()
        params = {"max_tokens": 8000, "ignore_eos": True}
        request = asyncio.ensure_future(
            running.engine.generate("asleep", GenerateParams("The", params), lambda *_: begun.set())
        )
        await begun.wait()
        await running.engine.asked(admin.sleep, admin.SleepParams())
        with pytest.raises(BridgeError) as caught:
            await request
        assert caught.value.reason == "aborted"
        assert caught.value.details["outputs"][0]["token_ids"]
        await running.engine.asked(admin.wake_up, admin.WakeUpParams())

    running.run(scenario())
    assert running.complete("The capital of France is")["text"] == " Paris."
