"""What kinds of models there are, and what users are told of them. ``test_model_cards`` has it of
well-known models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gguf_models
from conftest import MODELS
from vllm_bridge.checkpoints import families
from vllm_bridge.engine import notes
from vllm_bridge.engine.plan import Plan, plan

QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
CHAT = "{% if enable_thinking %}<think>{% endif %}{{ tools }}"


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
        # Of a plugin that vLLM names.
        ({"architectures": ["Nemotron3_5AsrForRNNT"]}, None),
        ({"architectures": [4]}, None),
        ({"architectures": "LlamaForCausalLM"}, None),
        ({}, None),
    ],
)
def test_the_family_of_a_config(config: dict[str, Any], family: str | None) -> None:
    assert families.of(config) == family


def test_a_user_may_say_what_it_is(chat_model: Callable[..., Plan]) -> None:
    config = {"architectures": ["FooForImageClassification"], "model_type": "foo"}
    (refused,) = chat_model(config, CHAT).findings
    assert refused.reason == "unsupported_model"
    overrides = {"architectures": ["LlamaForCausalLM"]}
    assert chat_model(config, CHAT, hf_overrides=overrides).findings == ()


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


def test_what_the_options_make_of_a_model(chat_model: Callable[..., Plan]) -> None:
    assert notes.capabilities(chat_model(QWEN, CHAT, runner="pooling"))[0] == "embed"
    assert notes.capabilities(chat_model(QWEN, CHAT, convert="classify")) == ("classify",)
    assert notes.capabilities(chat_model(QWEN, CHAT, runner="generate"))[0] == "generate"


def test_a_gguf_file_has_its_template_in_it(tmp_path: Path) -> None:
    made = plan(str(gguf_models.make("F16", tmp_path)), {})
    assert notes.capabilities(made) == notes.capabilities(plan(str(MODELS / "demo"), {}))
    assert notes.capabilities(made)[:2] == ("generate", "chat")


def test_a_template_of_another_tokenizer_counts(chat_model: Callable[..., Plan]) -> None:
    made = chat_model(QWEN, CHAT, tokenizer=str(MODELS / "demo-awq"))
    assert "reasoning" not in notes.capabilities(made)


def test_a_model_without_a_chat_template_does_not_chat(chat_model: Callable[..., Plan]) -> None:
    assert notes.capabilities(chat_model({}, "{{ messages }}")) == ("generate", "chat")
    assert notes.capabilities(chat_model({}, None)) == ("generate",)
