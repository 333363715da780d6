"""What is found out about well-known models without their weights, as ``model_cards`` has them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import pytest

import model_cards
from model_cards import Card
from vllm_bridge import memory
from vllm_bridge.advice import candidates, ranking
from vllm_bridge.advice.recommend import target_of
from vllm_bridge.advice.rules import rules
from vllm_bridge.checkpoints import detect
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.detect import Detected
from vllm_bridge.engine import elsewhere, notes
from vllm_bridge.engine.check import check
from vllm_bridge.engine.plan import Plan, plan
from vllm_bridge.memory import GIB
from vllm_bridge.sizing import devices, formats, kv_cache, weights
from vllm_bridge.sizing.estimate import estimate

NAMES = model_cards.names()

# How far a size may be from the published one: of tensors there is no doubt, files have headers
# too, and some are only known in the words of a model's publisher.
CLOSE = {"tensors": 0.0, "files": 0.001, "rounded": 0.005}


@functools.cache
def card(name: str) -> Card:
    return model_cards.read(name)


def that_say(field: str) -> list[str]:
    """The cards that have this field, or expect this of the model."""
    return [name for name in NAMES if field in card(name) or field in card(name)["expected"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Writes the model of a card, once."""

    @functools.cache
    def write(name: str) -> str:
        return str(model_cards.write(card(name), tmp_path_factory.mktemp("cards") / name))

    return write


@pytest.fixture(scope="module")
def planned(model: Callable[[str], str]) -> Iterator[Callable[[str], Plan]]:
    """The plan of the model of a card, on a machine with room for it, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available_cpu", lambda: 2**50)
        yield functools.cache(lambda name: plan(model(name), {}))


@pytest.fixture(scope="module")
def checkpoint(planned: Callable[[str], Plan]) -> Callable[[str], Checkpoint]:
    return lambda name: planned(name).checkpoint


@pytest.fixture(scope="module")
def detected(checkpoint: Callable[[str], Checkpoint]) -> Callable[[str], Detected]:
    """What is detected of the model of a card, once."""
    return functools.cache(lambda name: detect.of(checkpoint(name)))


def test_there_are_enough() -> None:
    assert len(that_say("published")) >= 40


@pytest.mark.parametrize("name", that_say("published"))
def test_sizes_are_those_that_are_published(
    name: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    published = card(name)["published"]
    assert published["source"]
    size = weights.weights(checkpoint(name), {}).disk
    assert size == pytest.approx(published["bytes"], rel=CLOSE[published["of"]], abs=0)


@pytest.mark.parametrize("name", that_say("in_format"))
def test_plain_models_would_take_in_a_format_what_others_published_in_it(
    name: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    made = card(name)["in_format"]
    found = {one.name: one.disk for one in formats.in_formats(checkpoint(made["of"]))}
    assert found[made["name"]] == pytest.approx(card(name)["published"]["bytes"], rel=0.003)


@pytest.mark.parametrize("name", that_say("loaded"))
def test_weights_take_in_memory_what_vllm_says(
    name: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    found = weights.weights(checkpoint(name), {}).memory / GIB
    assert found == pytest.approx(card(name)["loaded"]["gib"], rel=0.05)


@pytest.mark.parametrize("name", that_say("unsized"))
def test_a_size_without_a_source_is_none(name: str) -> None:
    assert "published" not in card(name)


# What is expected of a quantization, by the name that it has where it is detected.
SCHEME = ("bits", "format", "group_size", "symmetric", "desc_act")


@pytest.mark.parametrize("name", sorted({*that_say("tensors"), *that_say("gguf")}))
def test_how_they_are_quantized_is_detected(name: str, detected: Callable[[str], Detected]) -> None:
    expected = card(name)["expected"]
    found = detected(name)
    wire = found.to_wire()
    assert found.method == expected["method"]
    assert {one: wire[one] for one in SCHEME if one in expected} == {
        one: expected[one] for one in SCHEME if one in expected
    }
    assert (found.made_for is not None) == ("unsupported" in expected)


@pytest.mark.parametrize("name", that_say("parameters"))
def test_packed_weights_are_counted_as_what_they_stand_for(
    name: str, detected: Callable[[str], Detected]
) -> None:
    found = detected(name).parameters
    # Some have biases of zeros that the model does not have, and some figures count scales.
    close = 3e-4 if card(name)["expected"]["method"] else 0.0
    assert found == pytest.approx(card(name)["parameters"], rel=close, abs=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_plan_says_of_them(name: str, planned: Callable[[str], Plan]) -> None:
    made, expected = planned(name), card(name)["expected"]
    refusals = [finding for finding in made.findings if finding.severity == "error"]
    assert [one.reason for one in refusals] == [*filter(None, [expected.get("refused")])]
    assert all(one.message and one.remedy for one in refusals)
    assert made.method == expected.get("method")
    assert notes.family(made) == expected["family"]


@pytest.mark.parametrize("name", NAMES)
def test_what_users_should_know_of_their_families(
    name: str, planned: Callable[[str], Plan]
) -> None:
    made, expected = planned(name), card(name)["expected"]
    found, family = list(notes.of(made)), expected["family"]
    thinks = "reasoning" in expected
    assert ("reasoning" in notes.capabilities(made)) == thinks
    if thinks:
        assert found.pop().details["option"] == "reasoning_parser"
    if family == "speech":
        assert [(one.severity, one.reason) for one in found] == [("warning", "unsupported_model")]
    elif expected.get("refused") == "unsupported_model":
        assert found == []
    else:
        assert [(one.severity, one.details["family"]) for one in found] == [("info", family)]


@pytest.mark.parametrize("name", that_say("kv"))
def test_the_cache_of_a_token_takes_what_is_said(
    name: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    assert kv_cache.of(checkpoint(name).config, {}).bytes_per_token == card(name)["kv"]["bytes"]


@pytest.mark.parametrize("name", that_say("cache"))
def test_the_cache_has_room_for_as_many_tokens_as_vllm_says(
    name: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    said, config = card(name)["cache"], checkpoint(name).config
    cache = kv_cache.of(config, said["options"])
    length = kv_cache.max_length(config, said["options"])
    assert cache.tokens(int(said["gib"] * GIB), length) == pytest.approx(said["tokens"], rel=0.02)


# Models, and devices on which it is said whether they fit.
ON = [(name, on) for name in that_say("fits") for on in card(name)["expected"]["fits"]]


def fits(name: str, on: str) -> bool:
    said: bool = card(name)["expected"]["fits"][on]
    return said


def at_4096(made: Plan) -> Plan:
    """The same with a context of 4,096 tokens."""
    return dataclasses.replace(made, options={"max_model_len": 4096})


@pytest.mark.parametrize(("name", "on"), ON)
def test_whether_they_fit(name: str, on: str, planned: Callable[[str], Plan]) -> None:
    found = estimate(at_4096(planned(name)), devices.named(on))
    assert found["fits"] is fits(name, on)
    if found["fits"]:
        assert found["longest_context"] >= 4096
        assert found["kv_cache"]["tokens"] >= 4096
    else:
        assert found["remedies"]
    for device in found["devices"]:
        parts = ("weights", "adapters", "draft", "activations", "framework", "kv_cache")
        assert device["fits"] is (sum(device[part] for part in parts) <= device["budget"])


@pytest.mark.parametrize("name", that_say("served"))
def test_as_many_tokens_fit_on_a_gpu_as_vllm_says(
    name: str, planned: Callable[[str], Plan]
) -> None:
    served = card(name)["served"]
    asked = dataclasses.replace(planned(name), options=served["options"])
    found = estimate(asked, devices.named(served["device"]))
    assert found["kv_cache"]["tokens"] == pytest.approx(served["tokens"], rel=0.1)


@pytest.mark.parametrize(("name", "on"), [(name, on) for name, on in ON if not fits(name, on)])
def test_what_does_not_fit_is_not_recommended(
    name: str, on: str, planned: Callable[[str], Plan], detected: Callable[[str], Detected]
) -> None:
    short, machine, known = at_4096(planned(name)), devices.named(on), rules()
    offered = candidates.of(short, detected(name), machine[0].kind, known)
    target = target_of(short, machine)
    for goal in ("quality", "latency", "throughput", "memory"):
        parameters = detected(name).parameters or 0
        choices, out = ranking.rank(offered, known.goals[goal], target, parameters, known)
        assert offered[0] in [one.candidate for one in out if one.why == "does_not_fit"]
        assert all(choice.needs <= target.room.total for choice in choices)
        # Of a quantized model there is no other format.
        assert bool(choices) == (detected(name).method is None)


@pytest.mark.slow
def test_a_check_for_another_machine_says_what_the_estimate_says(
    planned: Callable[[str], Plan],
) -> None:
    for name, on in ON:
        machine = devices.named(on)
        options = {"max_model_len": 4096, "tensor_parallel_size": len(machine)}
        found = elsewhere.check(dataclasses.replace(planned(name), options=options), machine)
        against = {finding.reason for finding in found if finding.severity != "info"}
        assert against == (set() if fits(name, on) else {"out_of_memory"}), (name, on)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1-405b",
        "mixtral-8x7b",
        "llama-3.1-8b-w4a16",
        "llama-3.1-8b-hqq",
        "deepseek-v2-lite",
        "jamba-v0.1",
        "qwen3-embedding-0.6b",
        "bge-reranker-v2-m3",
    ],
)
def test_nothing_but_room_is_against_them_here(
    name: str, model: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_cpu", lambda: 2**50)
    checked = check(model(name), {"max_model_len": 512})
    assert [finding for finding in checked.findings if finding.severity == "error"] == []
    assert checked.configured().vllm_config.model_config.max_model_len == 512
