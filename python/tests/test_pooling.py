"""Pooling on real engines, against what transformers computes from the same weights."""

import asyncio
import itertools
import os
import signal
from array import array
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaForSequenceClassification
from vllm import PoolingParams
from vllm.platforms import current_platform

import stopping
from conftest import MODELS
from pooling_models import LABELS, make_classifier
from vllm_bridge import admin
from vllm_bridge.engine.engine import GenerateParams
from vllm_bridge.engine.start import load
from vllm_bridge.errors import BridgeError
from vllm_bridge.pooling import (
    PoolParams,
    ScoreParams,
    pooling_fields,
    pooling_output,
    wrong_task,
)
from vllm_bridge.rpc.protocol import pack_u32, unpack_u32

T = TypeVar("T")

DEMO = MODELS / "demo"
EMBED = {"runner": "pooling", "convert": "embed"}
TEXTS = ["The capital of France is", "The capital of Japan is", "The", "Seven is a number."]


class Running:
    """An engine and the event loop that it lives on."""

    def __init__(self, model: Path, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.ids = map(str, itertools.count())
        # Single precision throughout, so that numbers can be compared.
        options |= {"dtype": "float32", "enforce_eager": True, "max_model_len": 256}
        options |= {"kv_cache_memory_bytes": 2**27}
        self.engine = self.run(load(str(model), options))
        self.info = self.engine.info()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 120))

    async def pool(self, prompt: Any, task: str | None = None, **params: Any) -> dict[str, Any]:
        tokenization = params.pop("tokenization_kwargs", {})
        priority = params.pop("priority", 0)
        return await self.engine.pool(
            next(self.ids), PoolParams(prompt, task, params, tokenization, priority)
        )

    async def score(
        self, data_1: list[str], data_2: list[str], template: str | None = None, **params: Any
    ) -> list[dict[str, Any]]:
        return await self.engine.score(
            next(self.ids), ScoreParams(data_1, data_2, params, chat_template=template)
        )

    def vector(self, prompt: Any, task: str | None = None, **params: Any) -> torch.Tensor:
        return tensor(self.run(self.pool(prompt, task, **params)))

    def refused(self, coroutine: Coroutine[Any, Any, Any]) -> BridgeError:
        with pytest.raises(BridgeError) as caught:
            self.run(coroutine)
        # An error of one request is nobody else's, and leaves none behind.
        assert self.engine._llm.output_processor.get_num_unfinished_requests() == 0
        return caught.value


@contextmanager
def running(model: Path, **options: Any) -> Iterator[Running]:
    environment = dict(os.environ)
    running = Running(model, **options)
    try:
        yield running
    finally:
        stopping.stop(running.engine._llm)
        running.loop.run_until_complete(asyncio.sleep(0))
        os.environ.clear()
        os.environ.update(environment)


def tensor(output: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(array("f", bytes(output["data"])).tolist()).reshape(output["shape"])


@pytest.mark.parametrize(
    "data",
    [torch.rand(3, 4), torch.rand(4, 2)[:, 0], torch.rand(2, 4).t(), torch.tensor(0.5).half()],
)
def test_whatever_a_tensor_lies_in_its_numbers_are_sent(data: torch.Tensor) -> None:
    output = pooling_output(
        SimpleNamespace(
            request_id="7",
            prompt_token_ids=[1],
            num_cached_tokens=0,
            outputs=SimpleNamespace(data=data),
        )
    )
    assert torch.equal(tensor(output), data.float())


def token_ids(text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"]
    return ids


def hidden_states(ids: list[int]) -> torch.Tensor:
    model = AutoModel.from_pretrained(DEMO, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).last_hidden_state[0]


def unit(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector, dim=-1)


def close(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool(torch.allclose(ours, reference, rtol=1e-3, atol=1e-3))


@pytest.fixture(scope="module")
def embedder() -> Iterator[Running]:
    with running(DEMO, **EMBED, hf_overrides={"is_matryoshka": True}) as embedder:
        yield embedder


@pytest.mark.engine
def test_an_embedder_describes_itself(embedder: Running) -> None:
    assert embedder.info["runner"] == "pooling"
    assert embedder.info["pooling_task"] == "embed"
    assert embedder.info["labels"] is None
    assert "embed" in embedder.info["tasks"]


@pytest.mark.engine
def test_a_vector_is_the_last_token_s_of_length_1(embedder: Running) -> None:
    for text in TEXTS:
        output = embedder.run(embedder.pool(text, "embed"))
        assert output["shape"] == [256]
        assert unpack_u32(output["prompt_token_ids"]) == token_ids(text)
        assert close(tensor(output), unit(hidden_states(token_ids(text))[-1]))


@pytest.mark.engine
def test_the_engine_s_task_is_the_default_and_tokens_are_a_prompt(embedder: Running) -> None:
    ids = token_ids(TEXTS[0])
    by_tokens = embedder.vector({"prompt_token_ids": pack_u32(ids)})
    assert close(by_tokens, embedder.vector(TEXTS[0], "embed"))


@pytest.mark.engine
def test_pooling_parameters(embedder: Running) -> None:
    last = hidden_states(token_ids(TEXTS[0]))[-1]
    assert close(embedder.vector(TEXTS[0], use_activation=False), last)
    assert close(embedder.vector(TEXTS[0], dimensions=16), unit(last[:16]))


@pytest.mark.engine
def test_a_prompt_can_be_cut(embedder: Running) -> None:
    text = "The capital of France is Paris. " * 100
    ids = token_ids(text)
    assert len(ids) > 256
    error = embedder.refused(embedder.pool(text))
    assert error.reason == "prompt_too_long"
    assert error.details["max_model_len"] == 256
    assert "256 tokens" in error.message
    for given, kept in [
        ({"truncate_prompt_tokens": -1}, ids[:256]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, ids[-4:]),
    ]:
        output = embedder.run(embedder.pool(text, tokenization_kwargs=given))
        assert unpack_u32(output["prompt_token_ids"]) == kept


@pytest.mark.engine
@pytest.mark.slow
def test_4096_prompts_at_once(embedder: Running) -> None:
    async def all_of_them() -> list[dict[str, Any]]:
        prompts = [{"prompt_token_ids": pack_u32([5, 3 + i % 1000])} for i in range(4096)]
        return await asyncio.gather(*(embedder.pool(prompt) for prompt in prompts))

    outputs = embedder.run(all_of_them())
    assert {len(output["data"]) for output in outputs} == {4 * 256}
    assert close(tensor(outputs[0]), tensor(outputs[4000]))
    assert not close(tensor(outputs[0]), tensor(outputs[1]))


@pytest.mark.engine
def test_scores_of_vectors_are_their_cosines(embedder: Running) -> None:
    vectors = [embedder.vector(text) for text in TEXTS]
    outputs = embedder.run(embedder.score(TEXTS[:1], TEXTS))
    assert [output["shape"] for output in outputs] == [[]] * 4
    cosines = torch.stack([vectors[0] @ vector for vector in vectors])
    assert close(torch.stack([tensor(output) for output in outputs]), cosines)
    assert float(tensor(outputs[0])) == pytest.approx(1.0, abs=1e-4)

    pairs = embedder.run(embedder.score(TEXTS, TEXTS[::-1]))
    assert close(tensor(pairs[1]), vectors[1] @ vectors[2])
    tokens = unpack_u32(pairs[1]["prompt_token_ids"])
    assert tokens[: len(token_ids(TEXTS[1]))] == token_ids(TEXTS[1])


@pytest.mark.engine
@pytest.mark.parametrize(
    ("params", "option"),
    [
        ({"dimensions": 1000}, "dimensions"),
        ({"dimensions": "all"}, "dimensions"),
        ({"dimension": 8}, "dimension"),
        ({"step_tag_id": 1}, "step_tag_id"),
        ({"output_kind": 1}, "output_kind"),
        ({"tokenization_kwargs": {"truncate_prompt_tokens": 257}}, "truncate_prompt_tokens"),
        ({"tokenization_kwargs": {"truncation_side": "up"}}, "truncation_side"),
        ({"tokenization_kwargs": {"max_length": 5}}, "max_length"),
        ({"priority": 1}, "priority"),
    ],
)
def test_parameters_that_are_wrong(embedder: Running, params: dict[str, Any], option: str) -> None:
    error = embedder.refused(embedder.pool("The", **params))
    assert error.reason == "invalid_option"
    assert error.details["option"] == option


@pytest.mark.engine
def test_requests_that_the_engine_cannot_serve(embedder: Running) -> None:
    assert embedder.refused(embedder.pool("")).reason == "invalid_prompt"
    unknown = {"prompt_token_ids": pack_u32([4000])}
    assert embedder.refused(embedder.pool(unknown)).reason == "invalid_prompt"

    error = embedder.refused(embedder.pool("The", "classify"))
    assert (error.reason, error.details["options"]) == ("unsupported", {"convert": "classify"})
    error = embedder.refused(embedder.pool("The", "token_embed"))
    assert error.details["options"] == {"pooler_config": {"task": "token_embed"}}
    error = embedder.refused(embedder.pool("The", "embeddings"))
    assert (error.reason, error.details["option"]) == ("invalid_option", "pooling_task")

    error = embedder.refused(embedder.engine.generate("1", GenerateParams("The")))
    assert error.reason == "unsupported"
    assert '`runner: "generate"`' in error.message

    # One bad text ends the others of its request.
    error = embedder.refused(embedder.score(["The"], ["The"] * 50 + ["x " * 400]))
    assert error.reason == "prompt_too_long"


@pytest.mark.engine
def test_a_cancelled_request_leaves_vllm(embedder: Running) -> None:
    async def scenario() -> None:
        llm = embedder.engine._llm
        task = asyncio.ensure_future(embedder.score(["The"], TEXTS * 100))
        while llm.get_num_unfinished_requests() == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert llm.get_num_unfinished_requests() == 0

    embedder.run(scenario())


@pytest.mark.engine
def test_scores_that_a_sleep_has_ended_are_none(
    embedder: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU takes the call, and does nothing but end the requests.
    llm = embedder.engine._llm
    monkeypatch.setattr(current_platform, "is_sleep_mode_available", lambda: True)
    monkeypatch.setattr(llm.model_config, "enable_sleep_mode", True)

    core = llm.engine_core.resources.engine_manager.processes[0].pid
    texts, put_to_sleep = TEXTS * 100, llm.engine_core.sleep_async

    async def sent(*given: Any) -> None:
        answer = asyncio.ensure_future(put_to_sleep(*given))
        await asyncio.sleep(0)
        os.kill(core, signal.SIGCONT)
        await answer

    monkeypatch.setattr(llm.engine_core, "sleep_async", sent)

    async def scenario() -> None:
        # It finds what it is to end beside the word that it is to sleep, and is not done before.
        os.kill(core, signal.SIGSTOP)
        try:
            task = asyncio.ensure_future(embedder.score(["The"], texts))
            while llm.get_num_unfinished_requests() == 0:
                await asyncio.sleep(0)
            await embedder.engine.asked(admin.sleep, admin.SleepParams())
        finally:
            os.kill(core, signal.SIGCONT)
        # Those that came after it wait until then.
        await embedder.engine.asked(admin.wake_up, admin.WakeUpParams())
        with pytest.raises(BridgeError) as caught:
            await task
        assert caught.value.reason == "aborted"

    embedder.run(scenario())
    assert len(embedder.run(embedder.score(["The"], TEXTS))) == len(TEXTS)


def logits(model: Path, ids: list[int]) -> torch.Tensor:
    classifier = LlamaForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        return classifier(torch.tensor([ids])).logits[0]


@pytest.mark.engine
@pytest.mark.slow
def test_a_classifier(tmp_path: Path) -> None:
    model = make_classifier(tmp_path / "classifier", LABELS)
    with running(model) as classifier:
        assert classifier.info["runner"] == "pooling"
        assert classifier.info["pooling_task"] == "classify"
        assert classifier.info["labels"] == LABELS
        for text in TEXTS:
            reference = logits(model, token_ids(text))
            probs = classifier.vector(text, "classify")
            assert close(probs, reference.softmax(-1))
            assert close(classifier.vector(text, use_activation=False), reference)
            # The heads are random, not flat.
            assert probs.max() > 0.4
        error = classifier.refused(classifier.score(["a"], ["b"]))
        assert error.reason == "unsupported"
        assert "3 classes" in error.message


@pytest.mark.engine
@pytest.mark.slow
def test_a_cross_encoder(tmp_path: Path) -> None:
    model = make_classifier(tmp_path / "cross-encoder", ["relevance"])
    query, documents = "The capital of France is", [" Paris.", " Tokyo.", " a number."]
    with running(model) as encoder:
        scores = encoder.run(encoder.score([query], documents))
        for output, document in zip(scores, documents, strict=True):
            assert output["shape"] == [1]
            pair = token_ids(query) + token_ids(document)
            assert unpack_u32(output["prompt_token_ids"]) == pair
            reference = logits(model, pair).sigmoid()
            assert close(tensor(output), reference)
        template = "{% for message in messages %}{{ message.content }};{% endfor %}"
        (templated,) = encoder.run(encoder.score([query], documents[:1], template))
        assert unpack_u32(templated["prompt_token_ids"]) == token_ids(f"{query}; Paris.;")
        (cut,) = encoder.run(
            encoder.score([query], documents[:1], extra_kwargs={"max_tokens_per_query": 2})
        )
        # The first token of a text is there in any case.
        pair = token_ids(query)[:3] + token_ids(documents[0])
        assert unpack_u32(cut["prompt_token_ids"]) == pair


@pytest.mark.engine
@pytest.mark.slow
def test_vectors_of_tokens() -> None:
    with running(DEMO, **EMBED, pooler_config={"task": "token_embed"}) as embedder:
        vectors = {text: unit(hidden_states(token_ids(text))) for text in TEXTS}
        for text in TEXTS:
            output = embedder.run(embedder.pool(text))
            assert output["shape"] == [len(token_ids(text)), 256]
            assert close(tensor(output), vectors[text])
        (score,) = embedder.run(embedder.score(TEXTS[:1], TEXTS[1:2]))
        best = (vectors[TEXTS[0]] @ vectors[TEXTS[1]].T).amax(dim=1).sum()
        assert close(tensor(score), best)
        error = embedder.refused(embedder.pool("The", "embed"))
        assert error.details["options"] == {"pooler_config": {"task": "embed"}}


def test_every_pooling_parameter_can_be_given_or_is_set_by_the_method() -> None:
    assert set(PoolingParams.__struct_fields__) == set(pooling_fields()) | {
        "task",
        "requires_token_ids",
        "late_interaction_params",
        "output_kind",
    }


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("embed", '`runner: "pooling", convert: "embed"`'),
        ("classify", '`runner: "pooling", convert: "classify"`'),
        (
            "token_embed",
            '`runner: "pooling", convert: "embed", pooler_config: %{task: "token_embed"}`',
        ),
    ],
)
def test_an_engine_that_generates_says_what_would_embed(task: str, words: str) -> None:
    error = wrong_task(task, None, ["generate"])
    assert error.reason == "unsupported"
    assert error.message.startswith(f"This engine generates text, and cannot do `{task}`.")
    assert words in error.message
