"""What kinds of models there are, and what users are told of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import model_cards
import refusals
from conftest import MODELS
from vllm_bridge.checkpoints import families
from vllm_bridge.engine import notes
from vllm_bridge.engine.plan import Plan, plan

CARDS = {name: model_cards.read(name) for name in model_cards.names()}

QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
CHAT = "{% if enable_thinking %}<think>{% endif %}{{ tools }}"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Plan]:
    folder = tmp_path_factory.mktemp("families")

    def make(name: str) -> Plan:
        model = model_cards.write(CARDS[name], folder / name)
        with refusals.unwatched():  # some headers are large
            return plan(str(model), {})

    return make


@pytest.mark.parametrize("name", CARDS)
def test_well_known_models(name: str, planned: Callable[[str], Plan]) -> None:
    expected, made = CARDS[name]["expected"], planned(name)
    assert notes.family(made) == expected["family"]
    refused = [found for found in made.findings if found.reason == "unsupported_model"]
    assert bool(refused) == expected.get("refused", False)
    for found in refused:
        assert found.details["family"] == expected["family"]
        assert "Elixir" in found.remedy
    told = [finding.severity for finding in notes.of(made)]
    assert told == {"speech": ["warning"]}.get(expected["family"], [] if refused else ["info"])


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"architectures": ["DetrForObjectDetection"]}, "object detection"),
        ({"architectures": ["SegformerForSemanticSegmentation"]}, "object detection"),
        ({"architectures": ["Wav2Vec2ForCTC"]}, "speech"),
        ({"architectures": ["Wav2Vec2ForPreTraining"], "model_type": "wav2vec2"}, "speech"),
        ({"architectures": ["BertForPreTraining"], "model_type": "bert"}, None),
        ({"architectures": ["TimeSeriesTransformerForPrediction"]}, "tabular"),
        ({"sklearn": {"model": {"file": "model.skops"}}}, "tabular"),
        ({"_class_name": "UNet2DConditionModel"}, "diffusion"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}}, "reranker"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "classifier"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "reward"),
        ({"architectures": ["ColQwen3"]}, "late interaction"),
        (
            {"architectures": ["Qwen2AudioForConditionalGeneration"], "audio_config": {}},
            "audio",
        ),
        ({"architectures": ["MadeUp"]}, None),
        ({"architectures": [4]}, None),
        ({"architectures": "LlamaForCausalLM"}, None),
        ({}, None),
    ],
)
def test_the_family_of_a_config(config: dict[str, Any], family: str | None) -> None:
    assert families.of(config) == family


def test_the_registry_is_that_of_vllm() -> None:
    from vllm.model_executor.models import ModelRegistry

    known = {
        architecture: families.is_known({"architectures": [architecture]})
        for architecture in ModelRegistry.get_supported_archs()
    }
    # Neither is for models of users: drafts of others, and transformers' classes by vLLM's names.
    others = {name for name, is_known in known.items() if not is_known}
    assert len(known) - len(others) > 250
    assert not {name for name in others if name.endswith("ForConditionalGeneration")}


@pytest.fixture
def chat_model(tmp_path: Path) -> Callable[..., Plan]:
    """Plans a copy of the demo model with another config and another chat template."""

    def make(config: dict[str, Any], template: str | None, **options: Any) -> Plan:
        folder = shutil.copytree(MODELS / "demo", tmp_path / "model", dirs_exist_ok=True)
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | config))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        said = json.loads((folder / "tokenizer_config.json").read_text())
        said["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        return plan(str(folder), options)

    return make


def test_a_model_that_thinks_has_a_parser_for_it(chat_model: Callable[..., Plan]) -> None:
    made = chat_model(QWEN, CHAT)
    assert notes.capabilities(made) == ("generate", "chat", "tools", "reasoning")
    _, thinks = notes.of(made)
    assert thinks.remedy.startswith('`reasoning_parser: "qwen3"`')
    assert "deepseek_r1" in thinks.details["allowed"]
    (only,) = notes.of(chat_model(QWEN, CHAT, reasoning_parser="qwen3"))
    assert only.details["family"] == "text"

    # Qwen2 is no name of a parser: it is a distillate of one of several.
    _, thinks = notes.of(chat_model({"model_type": "qwen2"}, CHAT))
    assert thinks.details["nearest"] == []
    assert "deepseek_r1" in thinks.remedy


def test_a_model_without_a_chat_template_does_not_chat(chat_model: Callable[..., Plan]) -> None:
    assert notes.capabilities(chat_model({}, "{{ messages }}")) == ("generate", "chat")
    assert notes.capabilities(chat_model({}, None)) == ("generate",)
