"""The formats that well-known models can have, where they are to be found, and what is recommended
of them. vLLM's part, which formats run, is left to the tests of ``running``."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import hub_models
import model_cards
from conftest import MODELS
from hub_server import Fault, Hub
from vllm_bridge import memory
from vllm_bridge.advice import candidates, hub, running
from vllm_bridge.advice.ranking import Candidate
from vllm_bridge.advice.recommend import recommend
from vllm_bridge.advice.rules import rules
from vllm_bridge.checkpoints import detect
from vllm_bridge.engine.plan import Plan, plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub.search import Found
from vllm_bridge.memory import GIB
from vllm_bridge.sizing import devices


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Writes the model of a card, once."""

    @functools.cache
    def write(name: str) -> str:
        path = tmp_path_factory.mktemp("cards") / name
        return str(model_cards.write(model_cards.read(name), path))

    return write


@pytest.fixture(scope="module", autouse=True)
def room_here() -> Iterator[None]:
    """What the machine that asks has of memory does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available_cpu", lambda: 4096 * GIB)
        yield


@pytest.fixture(scope="module")
def planned(model: Callable[[str], str]) -> Callable[[str], Plan]:
    return functools.cache(lambda name: plan(model(name), {}))


@pytest.fixture
def all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(found: Sequence[Candidate], *_others: Any) -> list[Candidate]:
        return list(found)

    monkeypatch.setattr(running, "refused", refused)


def of(planned: Plan, kind: str = "cuda") -> dict[str, Candidate]:
    found = candidates.of(planned, detect.of(planned.checkpoint), kind, rules())
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("llama-3.1-8b", "plain"),
        ("llama-2-7b-awq", "awq (4 bits)"),
        ("llama-2-7b-gptq", "gptq (4 bits)"),
        ("qwen2.5-7b-gptq-int8", "gptq (8 bits)"),
        ("llama-3.1-8b-fp8-dynamic", "compressed-tensors (FP8)"),
        ("llama-3.1-8b-bnb-4bit", "bitsandbytes (4 bits)"),
        ("mistral-7b-q4-k-m", "gguf (Q4_K_M)"),
        ("mistral-7b-q8-0", "gguf (Q8_0)"),
        ("qwen3-32b-fp8", "fp8"),
        ("gpt-oss-20b", "mxfp4"),
        ("llama-3.3-70b-nvfp4", "modelopt_fp4"),
        ("llama-3.1-8b-hqq", "hqq (4 bits)"),
    ],
)
def test_a_model_is_what_the_rules_call_so(
    card: str, name: str, planned: Callable[[str], Plan]
) -> None:
    found = detect.of(planned(card).checkpoint)
    assert detect.format_name(found) == name
    assert name in rules().formats


def test_a_plain_model_can_have_many_formats(planned: Callable[[str], Plan]) -> None:
    found = of(planned("llama-3.1-8b"))
    assert found["plain"].memory == pytest.approx(14.96 * GIB, rel=0.001)
    # As published: hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4 has 5.74 GB.
    assert found["awq (4 bits)"].disk == pytest.approx(5.73e9, rel=0.005)
    assert found["fp8"].ways[0].options == {"quantization": "fp8"}
    assert found["torchao (8 bits)"].memory < 0.6 * found["plain"].memory
    assert found["torchao (8 bits)"].disk == found["plain"].disk
    assert [way.kind for way in found["bitsandbytes (4 bits)"].ways] == ["in_flight", "make"]
    assert found["bitsandbytes (4 bits)"].ways[0].text == 'load the plain model with dtype: "int4"'
    # Nobody makes these of a plain model.
    assert not {"mxfp4", "squeezellm (4 bits)"} & found.keys()


def test_a_quantized_model_has_one_format(planned: Callable[[str], Plan]) -> None:
    assert list(of(planned("llama-2-7b-awq"))) == ["awq (4 bits)"]


def test_what_cpus_dequantize_takes_the_memory_of_16_bits(
    planned: Callable[[str], Plan],
) -> None:
    found = of(planned("llama-3.1-8b"), "cpu")
    assert found["fp8"].memory == found["plain"].memory
    assert found["awq (4 bits)"].memory < found["plain"].memory / 2
    experts = of(planned("mixtral-8x7b"), "cpu")
    assert experts["awq (4 bits)"].memory > 0.9 * experts["plain"].memory
    assert experts["gguf (Q4_K_M)"].memory < 0.4 * experts["plain"].memory
    assert experts["gguf (Q4_K_M)"].memory == of(planned("mixtral-8x7b"))["gguf (Q4_K_M)"].memory


def test_experts_and_architectures_leave_formats_out(planned: Callable[[str], Plan]) -> None:
    mixture = of(planned("mixtral-8x7b"))
    assert "hqq (4 bits)" not in mixture
    # The plugin does not find experts in flight; a checkpoint can be made.
    assert [way.kind for way in mixture["bitsandbytes (4 bits)"].ways] == ["make"]
    assert not any(name.startswith("gguf") for name in of(planned("falcon-7b")))


def repository(name: str, method: str | None, **fields: Any) -> Found:
    empty = dict.fromkeys(("size", "parameters", "task", "last_modified"))
    flags = {"gated": False, "private": False, "downloads": 1, "likes": 0}
    return Found(**{"id": name, "method": method, **empty, **flags, **fields})


@pytest.mark.parametrize(
    ("name", "method", "formats"),
    [
        ("a/Llama-AWQ", "awq", ["awq (4 bits)"]),
        ("a/Llama-GPTQ-Int8", "gptq", ["gptq (8 bits)"]),
        ("a/Llama-GPTQ-Int4", "gptq", ["gptq (4 bits)"]),
        ("a/Llama-gptq-3bit", "gptq", ["gptq (3 bits)"]),
        ("a/Llama-quantized.w8a8", "compressed-tensors", ["compressed-tensors (W8A8)"]),
        ("a/Llama-quantized.w4a16", "compressed-tensors", ["compressed-tensors (W4A16)"]),
        ("a/Llama-FP8-dynamic", "compressed-tensors", ["compressed-tensors (FP8)"]),
        ("a/Llama-FP8", "fp8", ["fp8"]),
        ("a/Llama-bnb-4bit", "bitsandbytes", ["bitsandbytes (4 bits)"]),
        ("a/Llama-finetune", None, []),
        ("a/Llama-exl2", "exl2", []),
    ],
)
def test_repositories_are_known_by_their_names(
    name: str, method: str | None, formats: list[str]
) -> None:
    assert list(hub.formats(repository(name, method), rules())) == formats


def test_the_most_downloaded_repository_of_each_format_is_offered(
    model: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, all_run: None
) -> None:
    asked = []

    def search(query: str, limit: int, **others: Any) -> list[Found]:
        asked.append((query, limit, others["filters"]))
        return [
            repository("a/m-AWQ", "awq"),
            repository("b/m-AWQ", "awq"),
            repository("c/m-GGUF", "gguf"),
            repository("d/m-bnb-4bit", "bitsandbytes", gated=True),
        ]

    monkeypatch.setattr(hub, "search", search)
    monkeypatch.setattr(
        "vllm_bridge.advice.recommend.plan", lambda *_: plan(model("llama-3.1-8b"), {})
    )
    advice = recommend("org/m:main", {}, "memory", devices.named("H100"), is_searched=True)
    assert asked == [("", 100, ["base_model:quantized:org/m"])]
    ways = {choice["format"]: choice["ways"] for choice in advice["choices"]}
    assert [way["text"] for way in ways["awq (4 bits)"]] == [
        'load "a/m-AWQ"',
        "make it with gptqmodel or llm-compressor and a text of yours",
    ]
    assert ways["gguf (Q4_K_M)"][0]["model"] == "c/m-GGUF:Q4_K_M"
    assert [way["kind"] for way in ways["bitsandbytes (4 bits)"]] == ["in_flight", "hub", "make"]
    assert ways["bitsandbytes (4 bits)"][1]["text"].endswith(", whose owner must let you")


def test_a_model_of_the_hub_is_found_there_in_other_formats(hub: Hub, all_run: None) -> None:
    files = {path.name: path.read_bytes() for path in (MODELS / "demo").iterdir()}
    tags = ["base_model:quantized:org/m"]
    hub_models.repository(hub.folder, "org/m", files)
    hub_models.repository(hub.folder, "a/m-AWQ", {}, tags=[*tags, "awq"], downloads=7)
    hub_models.repository(hub.folder, "b/m-AWQ", {}, tags=[*tags, "awq"], downloads=9)
    hub_models.repository(hub.folder, "c/other-AWQ", {}, tags=["awq"], downloads=99)
    advice = recommend("org/m", {}, "latency", devices.named("H100"), is_searched=True)
    # The header of the weights, and none of their eight million bytes.
    assert sum(request.sent for request in hub.for_weights) < 2_000_000
    hub.faults = [Fault("^/api/models$", status=401)]
    without = recommend("org/m", {}, "latency", devices.named("H100"), is_searched=True)
    best = advice["choices"][0]
    assert (best["format"], best["ways"][0]["model"]) == ("awq (4 bits)", "b/m-AWQ")
    assert [way["kind"] for way in without["choices"][0]["ways"]] == ["make"]
    assert without["notes"][-1].startswith("The hub was not searched. ")


@pytest.mark.parametrize(
    ("card", "device", "goal", "best"),
    [
        ("llama-3.1-8b", "RTX 4090", "latency", "awq (4 bits)"),
        ("llama-3.1-8b", "H100", "throughput", "fp8"),
        ("llama-3.1-8b", "A100", "throughput", "awq (4 bits)"),
        ("llama-3.1-8b", "H100", "quality", "plain"),
        ("llama-3.1-8b", "T4", "quality", "fp8"),
        ("llama-3.1-8b", "cpu 32GiB", None, "gguf (Q4_K_M)"),
        ("llama-3.1-70b", "2x RTX 4090", "latency", "awq (4 bits)"),
        ("llama-3.1-70b", "H100", "quality", "fp8"),
        ("llama-3.1-70b", "8x H100", "quality", "plain"),
        ("gpt-oss-20b", "24GiB", None, "mxfp4"),
        ("qwen3-embedding-0.6b", "24GiB", "quality", "plain"),
    ],
)
def test_what_is_recommended(
    card: str,
    device: str,
    goal: str | None,
    best: str,
    model: Callable[[str], str],
    all_run: None,
) -> None:
    advice = recommend(model(card), {}, goal, devices.named(device))
    assert advice["choices"][0]["format"] == best
    assert all(choice["needs"] > choice["memory"] for choice in advice["choices"])


def test_a_context_is_counted_that_devices_have_room_for(
    model: Callable[[str], str], all_run: None
) -> None:
    advice = recommend(model("llama-3.1-8b"), {}, "memory", devices.named("RTX 4090"))
    assert advice["goal"] == "memory"
    assert advice["device"] == "RTX 4090 24GB"
    assert advice["notes"] == [
        "Counted with a context of 8,192 tokens for one request (the model takes up to 131,072). "
        "Give max_model_len for another."
    ]
    longer = recommend(
        model("llama-3.1-8b"), {"max_model_len": 65536}, "memory", devices.named("RTX 4090")
    )
    assert longer["notes"] == []
    short, long = (
        {one["format"]: one["needs"] for one in found["choices"] + found["ruled_out"]}
        for found in (advice, longer)
    )
    # 128 KiB for each token.
    assert long["fp8"] - short["fp8"] == pytest.approx((65536 - 8192) * 128 * 1024, rel=0.01)


def test_a_quantized_model_says_what_to_ask_about(
    model: Callable[[str], str], all_run: None
) -> None:
    advice = recommend(model("llama-2-7b-awq"), {}, None, devices.named("T4"))
    assert [choice["format"] for choice in advice["choices"]] == ["awq (4 bits)"]
    assert advice["notes"][-1].startswith("The model is quantized already")


@pytest.mark.parametrize("card", ["magnum-12b-exl2", "llama-3.1-8b-mlx-4bit"])
def test_formats_of_other_programs_are_not_recommended(
    card: str, model: Callable[[str], str], all_run: None
) -> None:
    advice = recommend(model(card), {}, None, devices.named("H100"))
    assert advice["choices"] == []
    (refused,) = advice["ruled_out"]
    assert refused["why"] == "cannot_run"
    assert "which vLLM does not load" in refused["message"]


def test_models_that_vllm_is_not_for_are_refused(
    model: Callable[[str], str],
) -> None:
    with pytest.raises(BridgeError) as caught:
        recommend(model("stable-diffusion-xl"), {}, None, devices.named("H100"))
    assert caught.value.reason == "unsupported_model"


def test_goals_and_models_that_are_none_are_told(model: Callable[[str], str]) -> None:
    with pytest.raises(BridgeError) as caught:
        recommend(model("llama-3.1-8b"), {}, "latncy", devices.named("T4"))
    assert caught.value.details["nearest"] == "latency"
    assert caught.value.remedy.startswith("Give one of latency, throughput, ")
    with pytest.raises(BridgeError) as caught:
        recommend("/nowhere/at/all", {}, "latency", devices.named("T4"))
    assert caught.value.reason == "model_not_found"
