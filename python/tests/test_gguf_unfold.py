"""The folder that vLLM gets for a GGUF file."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import gguf_files
import gguf_models
import loading
from conftest import MODELS
from test_gguf_tokenizer import REFERENCE, metadata
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.engine import config
from vllm_bridge.engine.plan import plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import registry
from vllm_bridge.quantization.gguf.unfold import unfold
from vllm_bridge.quantization.method import Method

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "quantization_config": {"quant_method": "gguf"},
}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files: a worker's is removed with it by its guard."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def checkpoint(folder: Path, said: Mapping[str, Any], **changes: Any) -> Checkpoint:
    gguf_files.write(folder / "model.gguf", {"general.architecture": "llama"} | dict(said))
    return Checkpoint(str(folder), CONFIG | changes, files=("model.gguf",))


def read(checkpoint: Checkpoint) -> Any:
    """The tokenizer as vLLM reads it, with the config that it looks for beside it."""
    from vllm.tokenizers import get_tokenizer
    from vllm.transformers_utils.config import get_config

    arguments: dict[str, Any] = {}
    unfold(checkpoint, arguments)
    get_config(arguments["tokenizer"], trust_remote_code=False)
    return get_tokenizer(arguments["tokenizer"])


def test_the_folder_has_all_that_is_read_of_a_model(tmp_path: Path, temporary: Path) -> None:
    arguments: dict[str, Any] = {}
    folder = Path(unfold(checkpoint(tmp_path, metadata("demo")), arguments))
    assert folder.parent == temporary
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.gguf", "tokenizer",
    }  # fmt: skip
    assert (folder / "model.gguf").resolve() == tmp_path / "model.gguf"
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [1, 4]}
    assert arguments == {"tokenizer": str(folder / "tokenizer")}


# Of a Qwen2, Hugging Face's library takes no tokenizer as it is where there is a config beside it.
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_hugging_face_reads_the_tokenizer_as_it_is(tmp_path: Path, model_type: str) -> None:
    for name in ("sentencepiece", "bytes"):
        (case,) = (
            case
            for case in REFERENCE["cases"]
            if case["vocabulary"] == name and case["changes"] in ({}, {"pre": "llama-bpe"})
        )
        said = metadata(name, **case["changes"])
        (tmp_path / name).mkdir()
        tokenizer = read(checkpoint(tmp_path / name, said, model_type=model_type))
        assert [tokenizer(text)["input_ids"] for text in REFERENCE["texts"]] == case["ids"]
        assert len(tokenizer) == len(said["tokenizer.ggml.tokens"])
        assert tokenizer.eos_token_id == said["tokenizer.ggml.eos_token_id"]
        ids = case["ids"][2]
        assert tokenizer.decode(ids, skip_special_tokens=True) == REFERENCE["texts"][2]


def test_a_chat_template_is_rendered(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    said = metadata("demo") | {
        "tokenizer.chat_template": template,
        "tokenizer.chat_template.tool_use": "{{ tools[0].name }}",
    }
    tokenizer = read(checkpoint(tmp_path, said))
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Hello</s>"
    tools = [{"name": "add"}]
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) == "add"


@pytest.mark.parametrize("option", [{"tokenizer": "theirs"}, {"skip_tokenizer_init": True}])
def test_a_tokenizer_of_the_users_takes_the_place_of_one_that_makes_no_sense(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    said = metadata("demo", model="made-up", merges=None)
    with pytest.raises(BridgeError):
        unfold(checkpoint(tmp_path, said), {})
    folder = Path(unfold(checkpoint(tmp_path, said), dict(option)))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.gguf"}


def test_nothing_is_left_of_a_file_that_is_refused(tmp_path: Path, temporary: Path) -> None:
    with pytest.raises(BridgeError):
        unfold(checkpoint(tmp_path, metadata("demo", tokens=None)), {})
    assert list(temporary.iterdir()) == []


def test_the_users_settings_are_in_the_config(tmp_path: Path) -> None:
    method, arguments = registry.of("gguf"), {"quantization_config": {"activations": "exact"}}
    folder = Path(method.prepare(checkpoint(tmp_path, metadata("demo")), arguments) or "")
    written = json.loads((folder / "config.json").read_text())
    assert written["quantization_config"] == {"quant_method": "gguf", "activations": "exact"}
    assert "quantization_config" not in arguments


@pytest.mark.parametrize(
    "settings", [{"activations": "int4"}, {"activation": "exact"}, "exact", {"activations": []}]
)
def test_settings_that_there_are_not_are_refused_with_those_that_there_are(settings: Any) -> None:
    with pytest.raises(BridgeError) as caught:
        registry.of("gguf").prepare(Checkpoint(), {"quantization_config": settings})
    assert caught.value.reason == "invalid_option"
    assert "'int8', 'exact'" in caught.value.message


def test_a_config_of_the_users_takes_the_place_of_the_config_and_of_nothing_else(
    tmp_path: Path,
) -> None:
    arguments: dict[str, Any] = {"hf_config_path": "theirs"}
    folder = unfold(checkpoint(tmp_path, metadata("demo")), arguments)
    assert arguments == {
        "hf_config_path": "theirs",
        "quantization": "gguf",
        "generation_config": folder,
        "tokenizer": f"{folder}/tokenizer",
    }
    arguments = {"hf_config_path": "theirs", "generation_config": "vllm"}
    unfold(checkpoint(tmp_path, metadata("demo")), arguments)
    assert arguments["generation_config"] == "vllm"


def test_vllm_takes_what_the_user_gives_in_place_of_what_the_file_has(tmp_path: Path) -> None:
    path, theirs = gguf_models.make("Q8_0", tmp_path), str(MODELS / "demo")
    for given in ({"hf_config_path": theirs}, {"tokenizer": theirs}):
        made, _ = loading.configure(path, max_model_len=256, **given)
        model = made.model_config
        assert (model.quantization, model.served_model_name) == ("gguf", str(path))
        assert model.try_get_generation_config()["eos_token_id"] == [1, 4]
        assert (model.tokenizer == theirs) == ("tokenizer" in given)


def test_a_model_whose_tokenizer_makes_no_sense_is_refused(tmp_path: Path) -> None:
    path = gguf_models.make("Q8_0", tmp_path)
    renamed = path.read_bytes().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez")
    path.write_bytes(renamed)
    refused = loading.refused(path)
    assert refused.reason == "invalid_checkpoint"
    assert f"The tokenizer in `{path}` makes no sense" in refused.message
    loading.configure(path, max_model_len=256, tokenizer=str(MODELS / "demo"))


class Unfolded(Method):
    name = "unfolded"

    def prepare(self, checkpoint: Checkpoint, arguments: dict[str, Any]) -> str | None:
        return str(arguments.pop("revision"))


@pytest.fixture
def unfolded() -> Iterator[None]:
    registry.register(Unfolded)
    yield
    del registry._added["unfolded"]


class Made(Exception):
    """Told instead of making vLLM's config."""


@pytest.mark.usefixtures("unfolded")
def test_vllm_gets_what_the_method_prepared_under_the_name_that_the_user_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def engine_config(model: str, _checkpoint: Checkpoint, arguments: Any, *_: Any) -> None:
        raise Made(model, arguments.get("served_model_name"))

    monkeypatch.setattr("vllm_bridge.quantization.preflight.engine_config", engine_config)
    monkeypatch.setattr("vllm_bridge.quantization.naming.check", lambda *_: None)
    model = str(MODELS / "demo")
    for method, folder, served in (("unfolded", "/folder", model), ("awq", model, None)):
        planned = plan(model, {"revision": "/folder"})
        quantized = {"quantization_config": {"quant_method": method}}
        changed = dataclasses.replace(planned.checkpoint, config=quantized)
        with pytest.raises(Made) as made:
            config.configure(dataclasses.replace(planned, checkpoint=changed))
        assert made.value.args == (folder, served)


def test_a_model_for_embeddings_goes_without_its_head(tmp_path: Path) -> None:
    path = gguf_models.make("Q8_0", tmp_path / "model")
    with loading.worker(tmp_path):
        model = loading.load(path, runner="pooling")
    assert model.model.embed_tokens.weight.dtype == torch.uint8
    assert model.lm_head.weight.is_meta
