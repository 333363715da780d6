"""Beams, prompts of embeddings, requests of vLLM's HTTP API, and what is measured, on the real
engine: one for all tests of this file."""

import asyncio
import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from conftest import MODELS
from running import Running
from vllm_bridge.beam_search import SearchParams
from vllm_bridge.engine.engine import GenerateParams
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import distributions, measure
from vllm_bridge.rpc.protocol import pack_u32, unpack_u32
from vllm_bridge.serving.exchange import Exchange, HttpParams, Settings

pytestmark = pytest.mark.engine

PROMPT = "The capital of France is"
HIDDEN = 256


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    running = Running()
    running.load(enable_prompt_embeds=True, max_model_len=512)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """What the model's first layer has for each token."""
    with safe_open(MODELS / "demo" / "model.safetensors", framework="pt") as file:
        weight: torch.Tensor = file.get_tensor("model.embed_tokens.weight")
    return weight.float()


# No two requests of an engine that are under way have the same id.
IDS = (f"beams-{n}" for n in itertools.count())


async def search(running: Running, prompt: Any, **params: Any) -> dict[str, Any]:
    params = {"beam_width": 4, "max_tokens": 16} | params
    return await running.engine.beam_search(next(IDS), SearchParams(prompt, params))


def refused(running: Running, prompt: Any, **params: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        running.run(search(running, prompt, **params))
    assert running.complete(PROMPT)["text"] == " Paris."
    return caught.value


async def stream(
    running: Running, pushes: bool, begun: asyncio.Event | None = None, **params: Any
) -> tuple[dict[int, tuple[str, bytes]], list[dict[str, Any]]]:
    """What the deltas of each completion add up to, and the completions as they are answered."""
    texts: dict[int, list[str]] = {}
    token_ids: dict[int, list[int]] = {}

    def put(output: Any, _messages: Any = None) -> None:
        for completion in output.outputs:
            texts.setdefault(completion.index, []).append(completion.text)
            token_ids.setdefault(completion.index, []).extend(completion.token_ids)
        if begun is not None:
            begun.set()

    running.engine._pushes = pushes
    asked = GenerateParams(PROMPT, {"temperature": 0.0, "max_tokens": 24} | params)
    output = await running.engine.generate(next(IDS), asked, put)
    added = {index: ("".join(texts[index]), pack_u32(token_ids[index])) for index in texts}
    return added, output["outputs"]


@pytest.mark.parametrize(
    "params",
    [
        {"ignore_eos": True},
        {"stop": ["is."], "include_stop_str_in_output": True},
        {"n": 3, "temperature": 1.0, "seed": 7},
        {"logprobs": 1},
    ],
    ids=["plain", "stop", "n", "logprobs"],
)
def test_deltas_that_are_pushed_are_those_of_vllms_own_stream(
    running: Running, params: dict[str, Any]
) -> None:
    ways = [running.run(stream(running, pushes, **params)) for pushes in (True, False)]
    said = []
    for added, outputs in ways:
        assert {o["index"]: (o["text"], o["token_ids"]) for o in outputs} == added
        said.append([(o["text"], o["token_ids"], o["finish_reason"]) for o in outputs])
        for output in outputs:
            if "logprobs" in params:
                assert len(output["logprobs"]["counts"]) == len(output["token_ids"]) > 0
    assert len(said[0]) == params.get("n", 1)
    assert said[0] == said[1]


@pytest.mark.parametrize("pushes", [True, False])
def test_a_stream_that_is_left_is_aborted(running: Running, pushes: bool) -> None:
    async def leave() -> None:
        begun = asyncio.Event()
        task = asyncio.ensure_future(
            stream(running, pushes, begun, max_tokens=400, ignore_eos=True)
        )
        await begun.wait()
        assert running.engine.progress()["unfinished"] == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running.engine.progress()["unfinished"] == 0

    running.run(leave())


def embedded(table: torch.Tensor, token_ids: list[int]) -> dict[str, Any]:
    data = table[token_ids].numpy().astype("<f4").tobytes()
    return {"prompt_embeds": data, "shape": [len(token_ids), HIDDEN]}


def test_the_best_beam_is_the_right_completion(running: Running, facts: dict[str, str]) -> None:
    some = list(facts)[:4]

    async def search_all() -> list[dict[str, Any]]:
        return await asyncio.gather(*(search(running, prompt) for prompt in some))

    outputs = running.run(search_all())
    assert {o["prompt"]: o["outputs"][0]["text"] for o in outputs} == {p: facts[p] for p in some}
    for output in outputs:
        best = output["outputs"][0]
        assert (best["finish_reason"], best["stop_reason"]) == ("stop", 1)
        assert [beam["index"] for beam in output["outputs"]] == [0, 1, 2, 3]
        assert len({beam["token_ids"] for beam in output["outputs"]}) == 4


def test_beams_are_sorted_by_their_log_probability(running: Running) -> None:
    output = running.run(search(running, PROMPT, length_penalty=0.0, max_tokens=6))
    sums = [beam["cumulative_logprob"] for beam in output["outputs"]]
    assert sums == sorted(sums, reverse=True)
    for beam in output["outputs"]:
        # For each step, as many as it looked at: twice the beams, and the token that it began with.
        counts = unpack_u32(beam["logprobs"]["counts"])
        assert set(counts) <= {8, 9}
        assert len(counts) == len(unpack_u32(beam["token_ids"])) + (beam["finish_reason"] == "stop")


def test_the_parameters_have_their_effect(running: Running) -> None:
    ended = running.run(search(running, PROMPT, include_stop_str_in_output=True))["outputs"][0]
    assert unpack_u32(ended["token_ids"])[-1] == 1
    assert ended["text"] == " Paris."
    (one,) = running.run(search(running, PROMPT, beam_width=1, max_tokens=1))["outputs"]
    assert one["finish_reason"] == "length"
    assert len(unpack_u32(one["token_ids"])) == 1
    going_on = running.run(search(running, PROMPT, ignore_eos=True, max_tokens=8))["outputs"]
    assert {len(unpack_u32(beam["token_ids"])) for beam in going_on} == {8}


def test_beams_end_where_the_context_ends(running: Running) -> None:
    prompt = {"prompt_token_ids": pack_u32([5] * 508)}
    output = running.run(search(running, prompt, ignore_eos=True, max_tokens=100))
    assert {len(unpack_u32(beam["token_ids"])) for beam in output["outputs"]} == {4}
    error = refused(running, {"prompt_token_ids": pack_u32([5] * 512)})
    assert error.reason == "prompt_too_long"
    assert error.details["max_model_len"] == 512


@pytest.mark.parametrize(
    ("params", "option"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": "4"}, "beam_width"),
        ({"beam_width": 11}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"length_penalty": "long"}, "length_penalty"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"beam_with": 4}, "beam_with"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
    ],
)
def test_wrong_parameters(running: Running, params: dict[str, Any], option: str) -> None:
    error = refused(running, PROMPT, **params)
    assert error.reason == "invalid_option"
    assert option in error.message
    assert error.details.get("option") in (option, None)


def test_what_vllm_has_no_default_for(running: Running) -> None:
    async def without_a_width() -> None:
        await running.engine.beam_search("beams", SearchParams(PROMPT, {"max_tokens": 1}))

    with pytest.raises(BridgeError) as caught:
        running.run(without_a_width())
    assert caught.value.details == {"option": "beam_width"}


def test_a_cancelled_search_leaves_vllm(running: Running) -> None:
    async def scenario() -> None:
        llm = running.engine._llm
        task = asyncio.ensure_future(search(running, "The", max_tokens=400, ignore_eos=True))
        while llm.get_num_unfinished_requests() < 4:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert llm.get_num_unfinished_requests() == 0

    running.run(scenario())
    assert running.complete(PROMPT)["text"] == " Paris."


def test_embeddings_complete_like_their_tokens(
    running: Running, facts: dict[str, str], table: torch.Tensor
) -> None:
    async def ask_all() -> list[dict[str, Any]]:
        tokens = await asyncio.gather(*(running.generate(p, max_tokens=1) for p in facts))
        ids = [unpack_u32(output["prompt_token_ids"]) for output in tokens]
        return await asyncio.gather(*(running.generate(embedded(table, i)) for i in ids))

    outputs = running.run(ask_all())
    assert [output["outputs"][0]["text"] for output in outputs] == list(facts.values())
    assert {output["prompt"] for output in outputs} == {None}
    # What is not known stands as zeros, so that it can be counted.
    assert set(unpack_u32(outputs[0]["prompt_token_ids"])) == {0}


def test_embeddings_and_other_parameters(running: Running, table: torch.Tensor) -> None:
    ids = unpack_u32(running.run(running.generate(PROMPT))["prompt_token_ids"])
    prompt = embedded(table, ids)
    params: dict[str, Any] = {
        "logprobs": 2,
        "n": 2,
        "repetition_penalty": 1.1,
        "temperature": 1.0,
        "seed": 1,
    }
    outputs = running.run(running.generate(prompt, **params))["outputs"]
    assert [output["index"] for output in outputs] == [0, 1]
    error = running.refused(prompt, prompt_logprobs=1)
    assert (error.reason, error.details) == ("invalid_option", {"option": "prompt_logprobs"})
    assert refused(running, prompt).reason == "unsupported"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"prompt_embeds": bytes(4 * HIDDEN)}, "`shape`"),
        ({"prompt_embeds": [0.5] * HIDDEN, "shape": [1, HIDDEN]}, "f32"),
        ({"prompt_embeds": b"", "shape": [0, HIDDEN]}, "at least 1"),
        ({"prompt_embeds": bytes(4 * HIDDEN), "shape": [HIDDEN]}, "`shape`"),
        ({"prompt_embeds": bytes(4 * HIDDEN), "shape": [1, HIDDEN], "prompt": "x"}, "`shape`"),
        ({"prompt_embeds": bytes(4 * HIDDEN), "shape": [2, HIDDEN]}, "2048"),
        ({"prompt_embeds": bytes(4 * HIDDEN - 4), "shape": [1, HIDDEN]}, "1020"),
        ({"prompt_embeds": bytes(4 * HIDDEN), "shape": [2, HIDDEN // 2]}, "takes 256"),
        ({"prompt_embeds": b"\x00\x00\xc0\x7f" * HIDDEN, "shape": [1, HIDDEN]}, "finite"),
        ({"prompt_embeds": b"\xff\xff\x7f\x7f" * HIDDEN, "shape": [1, HIDDEN]}, "finite"),
    ],
)
def test_embeddings_that_are_none(running: Running, prompt: Any, words: str) -> None:
    error = running.refused(prompt)
    assert error.reason == "invalid_prompt"
    assert words in error.message


def test_too_many_embeddings(running: Running) -> None:
    prompt = {"prompt_embeds": bytes(4 * HIDDEN * 513), "shape": [513, HIDDEN]}
    assert running.refused(prompt).reason == "prompt_too_long"


def test_a_model_is_measured_by_what_it_expects_of_texts(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As ``measure.prepared`` has it from the start.
    monkeypatch.setattr(running.engine._llm.model_config, "max_logprobs", -1)
    facts = (MODELS / "facts.tsv").read_text("utf-8").splitlines()[:4]
    texts = [fact.replace("\t", "") for fact in facts]
    told = []

    def measured() -> distributions.Distributions:
        demo = str(MODELS / "demo")
        asked = measure.of(running.engine, demo, {}, texts, 1000, lambda *now: told.append(now))
        return running.run(asked)

    whole = measured()
    assert whole.is_whole
    assert np.exp(whole.logprobs).sum(1) == pytest.approx(1, abs=1e-3)
    assert (whole.vocabulary, whole.figures["format"]) == (1024, "plain")
    # It knows them by heart, but for how each begins.
    assert 1 < whole.figures["perplexity"] < 10
    assert whole.figures["tokens"] == len(whole.chosen) == whole.lengths.sum() - len(texts)
    size = sum(len(text.encode()) for text in texts)
    bits = -whole.chosen.sum() / np.log(2) / size
    assert whole.figures["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert [len(answer) for answer in whole.figures["answer_ids"]] == [measure.ANSWER] * 3
    assert whole.figures["tokens_per_second"] > 0
    assert told[0] == ("measuring", 0, 4)
    assert told[-1] == ("generating", 2, 3)

    # What of a larger vocabulary would be kept.
    monkeypatch.setattr(distributions, "FULL", 1000)
    monkeypatch.setattr(distributions, "KEPT", 64)
    part = measured()
    assert not part.is_whole
    assert part.ids.shape == (len(whole.chosen), 64)
    assert np.array_equal(part.ids[:, 0], whole.ids[:, 0])
    found = distributions.divergence(whole, part)
    assert found.mean == pytest.approx(0, abs=1e-5)
    assert found.same_top == 1.0
    assert 0 < found.rest < 0.1


async def post(
    running: Running, path: str, rows: list[Any] | None = None, settings: Any = None, **body: Any
) -> dict[str, Any]:
    """What vLLM's own API answers to a request of a client that calls the model ``it``."""
    params = HttpParams(
        "POST",
        path,
        "it",
        credit=128,
        headers=[("content-type", "application/json")],
        body=json.dumps({"model": "it", "temperature": 0} | body).encode(),
        settings=settings or Settings(),
    )
    emit = ([] if rows is None else rows).append
    return await running.engine.http_request(next(IDS), params, Exchange(1, params, emit))


def test_vllms_api_answers_in_this_process(running: Running) -> None:
    answer = running.run(post(running, "/v1/completions", prompt=PROMPT, max_tokens=8))
    assert answer["status"] == 200
    said = json.loads(answer["body"])
    assert (said["model"], said["choices"][0]["text"]) == ("it", " Paris.")
    rows: list[Any] = []
    answer = running.run(post(running, "/v1/completions", rows, prompt=PROMPT, stream=True))
    assert (answer["status"], answer["body"]) == (200, b"")
    (_id, status, headers), *pieces = rows
    assert status == 200
    assert dict(headers)["content-type"].startswith("text/event-stream")
    events = [piece.removeprefix(b"data: ").strip() for _id, piece in pieces]
    assert events.pop() == b"[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == " Paris."
    for status, wrong in ((400, {"prompt": 5.5}), (404, {"prompt": PROMPT, "model": "another"})):
        refused = running.run(post(running, "/v1/completions", None, None, **wrong))
        assert (refused["status"], json.loads(refused["body"])["error"]["code"]) == (status, status)


def test_a_parser_of_tool_calls_that_vllm_does_not_have(running: Running) -> None:
    with pytest.raises(BridgeError, match="no parser of tool calls called `hremes`"):
        running.run(post(running, "/v1/completions", settings=Settings("hremes"), prompt=PROMPT))


def test_a_key_of_vllms_server_in_the_environment_is_asked_of_nobody(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-vllm")
    # Settings of its own, so that the app is made with this environment.
    settings = Settings(chat_template="{{ messages[0].content }}")
    answer = running.run(post(running, "/v1/completions", settings=settings, prompt=PROMPT))
    assert answer["status"] == 200


def test_the_app_leaves_the_workers_logs_as_they_are(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    running.run(post(running, "/v1/completions", prompt=PROMPT))
    logging.getLogger("vllm_bridge").warning("still heard")
    assert "still heard" in caplog.text


@pytest.mark.parametrize("streams", [True, False])
def test_what_a_client_leaves_is_aborted_in_vllm(running: Running, streams: bool) -> None:
    endless: dict[str, Any] = {"prompt": "Count:", "max_tokens": 400, "ignore_eos": True}

    async def leaves() -> None:
        before = running.engine.progress()["steps"]
        task = asyncio.ensure_future(post(running, "/v1/completions", stream=streams, **endless))
        while running.engine.progress()["steps"] < before + 3:
            await asyncio.sleep(0.001)
        assert running.engine.progress()["unfinished"] == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running.engine.progress()["unfinished"] == 0

    running.run(leaves())
