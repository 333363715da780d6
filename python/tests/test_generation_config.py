"""What a model's own defaults for sampling parameters may be."""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import MODELS
from vllm_bridge import generation_config
from vllm_bridge.engine.start import load
from vllm_bridge.errors import BridgeError


def write(folder: Path, values: Any) -> Path:
    path = folder / "generation_config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def refused(folder: Path, **arguments: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        generation_config.check(str(folder), arguments)
    return caught.value


def test_what_models_say(tmp_path: Path) -> None:
    generation_config.check(str(tmp_path), {})
    generation_config.check(None, {})
    usual = {"eos_token_id": [1, 4], "do_sample": True, "temperature": 1, "top_k": 50, "top_p": 0.9}
    rare = {"max_new_tokens": 64, "repetition_penalty": 1.1, "min_p": None, "top_h": "unknown"}
    write(tmp_path, usual | rare)
    generation_config.check(str(tmp_path), {})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", "hot", "valid number"),
        ("temperature", -1, "non-negative"),
        ("top_p", 2.0, "(0, 1]"),
        ("top_k", "many", "valid integer"),
        ("top_k", 5.5, "valid integer"),
        ("repetition_penalty", 0, "greater than zero"),
        ("max_new_tokens", "3", "valid integer"),
        ("max_new_tokens", 0, "at least 1"),
    ],
)
def test_what_no_request_could_give(tmp_path: Path, field: str, value: Any, words: str) -> None:
    path = write(tmp_path, {field: value})
    error = refused(tmp_path)
    assert error.reason == "invalid_checkpoint"
    assert f"`{path}` gives `{field}` as {value!r}: " in error.message
    assert words in error.message
    assert error.details == {"file": str(path), "field": field, "value": value}
    # Whoever names another source does not get these.
    generation_config.check(str(tmp_path), {"generation_config": "vllm"})
    generation_config.check(str(tmp_path), {"override_generation_config": {field: 1}})
    assert refused(Path("elsewhere"), generation_config=str(tmp_path)).details["field"] == field
    assert refused(Path("elsewhere"), hf_config_path=str(tmp_path)).details["field"] == field


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    error = refused(tmp_path)
    assert error.reason == "invalid_checkpoint"
    assert str(path) in error.message


def test_what_the_user_puts_over_it(tmp_path: Path) -> None:
    error = refused(tmp_path, override_generation_config={"temperature": "hot"})
    assert error.reason == "invalid_option"
    assert error.details["option"] == "override_generation_config"
    assert "`temperature` as 'hot'" in error.message


def test_a_model_of_the_hub() -> None:
    model_config = SimpleNamespace(get_diff_sampling_param=lambda: {"temperature": "hot"})
    with pytest.raises(BridgeError) as caught:
        generation_config.check_downloaded(model_config)
    assert caught.value.reason == "invalid_checkpoint"
    assert caught.value.details["file"] == "generation_config.json"


@pytest.mark.engine
def test_an_engine_does_not_start_with_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODELS / "demo", tmp_path / "model"))
    path = write(folder, {"temperature": "hot"})
    with pytest.raises(BridgeError) as caught:
        asyncio.run(load(str(folder), {}))
    assert caught.value.reason == "invalid_checkpoint"
    assert caught.value.details["file"] == str(path)
