"""What is known of an engine before it starts."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vllm_bridge
from conftest import MODELS
from vllm_bridge import memory, params, versions
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.engine import config
from vllm_bridge.engine.check import Checked
from vllm_bridge.engine.plan import Plan, plan
from vllm_bridge.errors import BridgeError

DEMO = str(MODELS / "demo")


def reasons(made: Plan) -> list[tuple[str, str]]:
    return [(finding.severity, finding.reason) for finding in made.findings]


def refuse(made: Plan) -> None:
    Checked(made, made.findings).refuse()


def refused(made: Plan) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        refuse(made)
    return caught.value


def test_a_plain_model() -> None:
    given = {"max_model_len": 64}
    made = plan(DEMO, given)
    refuse(made)
    assert made.findings == ()
    assert (made.model, made.method, made.online_dtype) == (DEMO, None, None)
    assert made.dtype == "bfloat16"
    assert made.options == {"max_model_len": 64, "load_format": "hf"}
    assert made.loaded_bytes == 8_133_120
    assert given == {"max_model_len": 64}
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.model = "another"  # type: ignore[misc]


def test_a_quantized_model() -> None:
    made = plan(str(MODELS / "demo-awq"), {})
    assert made.findings == ()
    assert (made.method, made.online_dtype) == ("awq", None)
    assert made.loaded_bytes < plan(DEMO, {}).loaded_bytes


def test_a_model_that_is_quantized_while_it_loads() -> None:
    made = plan(DEMO, {"dtype": "int4"})
    assert (made.method, made.online_dtype) == ("bitsandbytes", "int4")
    assert made.options["quantization"] == "bitsandbytes"
    assert made.loaded_bytes < plan(DEMO, {}).loaded_bytes
    assert plan(DEMO, {"quantization": "BnB"}).method == "bitsandbytes"


def test_all_that_is_wrong_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "is_cpu_build", lambda: True)
    monkeypatch.setattr(memory, "available_cpu", lambda: 1_000_000)
    folder = shutil.copytree(DEMO, tmp_path / "model")
    (folder / "generation_config.json").write_text("{")
    made = plan(str(folder), {"temprature": 1, "quantization": "gptq", "dtype": "int8"})
    assert reasons(made) == [
        ("error", "invalid_option"),  # no such option
        ("error", "invalid_option"),  # a dtype that means a method, and a method
        ("error", "unsupported_quantization"),
        ("error", "invalid_checkpoint"),
        ("error", "out_of_memory"),
    ]
    error = refused(made)
    assert error.details == {"option": "temprature", "nearest": None}
    assert made.checkpoint.folder == str(folder)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    made = plan(str(tmp_path / "none"), {"max_model_length": 1})
    assert [reason for _, reason in reasons(made)] == ["invalid_option", "model_not_found"]
    assert made.findings[0].details["nearest"] == "max_model_len"
    assert made.checkpoint == Checkpoint()
    assert (made.method, made.dtype, made.loaded_bytes) == (None, None, 0)


@pytest.mark.parametrize("option", ["tokenizer", "hf_config_path"])
def test_a_part_from_elsewhere_that_is_not_there(tmp_path: Path, option: str) -> None:
    (tmp_path / "theirs").mkdir()
    error = refused(plan(DEMO, {option: str(tmp_path / "their")}))
    assert error.reason == "model_not_found"
    assert error.details["option"] == option
    assert f"Did you mean `{tmp_path / 'theirs'}`?" in error.message
    for given in (f"{tmp_path}/model.gguf", "owner/name/model.gguf"):
        error = refused(plan(DEMO, {option: given}))
        assert (error.reason, error.details["option"]) == ("invalid_option", option)
        assert "is a GGUF file" in error.message
        assert "Leave the option out" in error.message
    for given in (str(tmp_path / "theirs"), "owner/name", "name"):
        assert plan(DEMO, {option: given}).findings == ()


def test_a_warning_does_not_keep_an_engine_from_starting(tmp_path: Path) -> None:
    names = ("a.safetensors", "b.safetensors")
    weights = [{"w": torch.zeros(4), name: torch.zeros(4)} for name in ("x", "y")]
    for name, tensors in zip(names, weights, strict=True):
        save_file(tensors, tmp_path / name)
    index = {"w": names[0], "x": names[0], "y": names[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text("{}")
    made = plan(str(tmp_path), {})
    refuse(made)
    assert reasons(made) == [("warning", "invalid_checkpoint")]
    assert made.findings[0].details == {"file": str(tmp_path / names[1]), "tensors": ["w"]}


def test_packages_that_are_missing_are_named_before_vllm_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    hidden = ("bitsandbytes", "vllm_bnb_plugin", "torchao")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )
    for options in ({"quantization": "bitsandbytes"}, {"quantization": "BnB"}, {"dtype": "int8"}):
        error = refused(plan(DEMO, options))
        assert error.reason == "unsupported_quantization"
        assert "mix vllm.setup --with" in error.message


@pytest.mark.parametrize("method", ["awq", "AutoGPTQ", "compressed_tensors"])
def test_a_method_of_checkpoints_for_a_plain_model(method: str) -> None:
    error = refused(plan(DEMO, {"quantization": method}))
    assert error.reason == "unsupported_quantization"
    assert "needs a checkpoint that was quantized with it" in error.message
    assert '`dtype: "int8"`' in error.message
    # A config of the user's makes it one.
    overrides = {"quantization_config": {"quant_method": "awq"}}
    refuse(plan(DEMO, {"quantization": method, "hf_overrides": overrides}))


@pytest.mark.parametrize(
    ("options", "offline"),
    [
        ({}, True),
        ({"tokenizer": DEMO, "hf_config_path": DEMO}, True),
        ({"tokenizer": "nobody/nothing"}, False),
        ({"hf_config_path": "nobody/nothing"}, False),
    ],
)
def test_the_hub_is_asked_for_what_is_there_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], offline: bool
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with config.offline(plan(DEMO, options)):
        assert ("HF_HUB_OFFLINE" in os.environ) == offline
    assert "HF_HUB_OFFLINE" not in os.environ


def test_the_names_of_options_are_those_of_vllm() -> None:
    assert set(params.engine_option_names()) == set(params.engine_fields())


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (DEMO, {}),
        (DEMO, {"temprature": 1}),
        (DEMO, {"quantization": "awq"}),
        (DEMO, {"dtype": "int8"}),
        (str(MODELS / "demo-gptq"), {}),
        ("/no/such/folder", {}),
    ],
)
def test_nothing_that_takes_seconds_is_imported(model: str, options: dict[str, Any]) -> None:
    script = """
import json, sys
from vllm_bridge.engine.check import Checked
from vllm_bridge.engine.plan import plan
plan(sys.argv[1], json.loads(sys.argv[2]))
heavy = {"torch", "vllm", "transformers", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    python = Path(vllm_bridge.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", script, model, json.dumps(options)],
        check=True,
        env=os.environ | {"PYTHONPATH": str(python)},
    )
