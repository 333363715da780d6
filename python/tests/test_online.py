"""Plain models that are quantized while they are loaded."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import MODELS
from running import GREEDY, Running
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.engine.engine import GenerateParams
from vllm_bridge.errors import BridgeError
from vllm_bridge.lora import LoRA
from vllm_bridge.quantization import online, registry

PARIS = "The capital of France is"
PLAIN = Checkpoint(folder="/models/plain", config={"model_type": "llama"})
AWQ = Checkpoint(config={"quantization_config": {"quant_method": "awq", "bits": 4}})


@pytest.mark.parametrize(
    ("dtype", "method"),
    [("int8", "torchao"), ("INT8", "torchao"), ("int4", "bitsandbytes"), (" Int4", "bitsandbytes")],
)
def test_a_dtype_that_means_a_method(dtype: str, method: str) -> None:
    options = {"dtype": dtype, "max_model_len": 64}
    assert online.take_dtype(options) == dtype.strip().lower()
    assert options == {"quantization": method, "max_model_len": 64}


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "auto"}, {"dtype": "bfloat16"}, {"dtype": 8}, {"dtype": "int16"}]
)
def test_other_dtypes_are_vllms(options: dict[str, Any]) -> None:
    before = dict(options)
    assert online.take_dtype(options) is None
    assert options == before


def test_the_loader_of_bitsandbytes_goes_with_its_method() -> None:
    options = {"load_format": "bitsandbytes"}
    assert online.take_dtype(options) is None
    assert options == {"quantization": "bitsandbytes"}
    options = {"load_format": "bitsandbytes", "quantization": "bnb"}
    assert online.take_dtype(options) is None
    assert options == {"quantization": "bnb"}
    options = {"load_format": "safetensors"}
    assert online.take_dtype(options) is None
    assert options == {"load_format": "safetensors"}


def test_a_method_beside_the_dtype_is_one_too_many() -> None:
    with pytest.raises(BridgeError) as caught:
        online.take_dtype({"dtype": "int8", "quantization": "hqq"})
    assert caught.value.reason == "invalid_option"
    assert caught.value.details["option"] == "dtype"
    assert "Leave out one of the two" in caught.value.message


@pytest.mark.parametrize("method", ["GGUF", "awq", "AutoGPTQ"])
def test_a_method_of_quantized_models_beside_the_dtype(method: str) -> None:
    with pytest.raises(BridgeError) as caught:
        online.take_dtype({"dtype": "int8", "quantization": method})
    assert caught.value.reason == "invalid_option"
    assert caught.value.details["option"] == "dtype"
    assert f'`quantization: "{method}"` is for models that are quantized already' in str(
        caught.value
    )
    assert "Leave out `dtype`" in caught.value.message


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_missing_package_is_named_with_the_command(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(BridgeError) as caught:
        online.take_dtype({"dtype": dtype})
    assert caught.value.reason == "unsupported_quantization"
    method = registry.online_dtypes()[dtype].name
    assert f"`mix vllm.setup --with {method}`" in caught.value.message


def test_a_quantized_model_is_not_quantized_again() -> None:
    with pytest.raises(BridgeError) as caught:
        online.check(AWQ, "int8")
    assert caught.value.reason == "unsupported_quantization"
    assert "awq (4 bits)" in caught.value.message
    online.check(AWQ, None)
    online.check(PLAIN, "int8")


def torchao_settings(options: dict[str, Any]) -> Any:
    return json.loads(options["hf_overrides"]["quantization_config_dict_json"])


def test_torchao_without_settings_makes_8_bit_weights() -> None:
    options: dict[str, Any] = {"quantization": "TorchAO"}
    assert online.take_settings(PLAIN, options) == "Int8WeightOnlyConfig"
    assert torchao_settings(options)["_type"] == "Int8WeightOnlyConfig"


def test_torchaos_settings_by_name_and_with_arguments() -> None:
    name = "Int8DynamicActivationInt8WeightConfig"
    options: dict[str, Any] = {"quantization": "torchao", "quantization_config": name}
    assert online.take_settings(PLAIN, options) == name
    assert torchao_settings(options)["_type"] == name
    assert "quantization_config" not in options

    options = {
        "quantization": "torchao",
        "quantization_config": {"type": "Int4WeightOnlyConfig", "group_size": 32},
        "hf_overrides": {"rope_theta": 1.0},
    }
    assert online.take_settings(PLAIN, options) == "Int4WeightOnlyConfig"
    assert torchao_settings(options)["_data"]["group_size"] == 32
    assert options["hf_overrides"]["rope_theta"] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "awq"},
        {"quantization": "awq", "quantization_config": {"type": "Int8WeightOnlyConfig"}},
        {"quantization": "torchao", "hf_overrides": {"quantization_config_file": "/x.json"}},
    ],
)
def test_other_settings_are_left_alone(options: dict[str, Any]) -> None:
    before = dict(options)
    assert online.take_settings(PLAIN, options) is None
    assert options == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("Int8WeightOnly", "Did you mean `Int8WeightOnlyConfig`?"),
        ({"type": "os.system"}, "torchao has no config `os.system`"),
        ({"type": "quantize_"}, "torchao has no config `quantize_`"),
        ({"type": "Int8WeightOnlyConfig", "colour": 1}, "colour"),
    ],
)
def test_settings_that_torchao_does_not_have(settings: Any, words: str) -> None:
    with pytest.raises(BridgeError) as caught:
        online.take_settings(PLAIN, {"quantization": "torchao", "quantization_config": settings})
    assert caught.value.reason == "invalid_option"
    assert caught.value.details["option"] == "quantization_config"
    assert words in caught.value.message


def test_what_is_said_of_experts() -> None:
    dense = SimpleNamespace(quantization="torchao", is_moe=False)
    mixture = SimpleNamespace(quantization="torchao", is_moe=True)
    note = online.note("int8", "Int8WeightOnlyConfig", dense)
    assert note == (
        "Quantized while it was loaded: 8-bit weights with a scale per channel, by torchao."
    )
    experts = online.note("int8", "Int8WeightOnlyConfig", mixture)
    assert experts == f"{note} Its experts are left as they are."
    named = online.note(None, "Float8WeightOnlyConfig", dense)
    assert named == "Quantized while it was loaded: torchao's Float8WeightOnlyConfig."
    assert online.note(None, None, mixture) is None


@pytest.mark.engine
def test_an_engine_refuses_to_quantize_a_quantized_model() -> None:
    running = Running()
    with pytest.raises(BridgeError) as caught:
        running.load(MODELS / "demo-awq", dtype="int4")
    assert caught.value.reason == "unsupported_quantization"


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "method", "words"),
    [
        ({"dtype": "int8"}, "torchao", "8-bit weights"),
        ({"dtype": "int4"}, "bitsandbytes", "4-bit weights"),
        (
            {
                "quantization": "torchao",
                "quantization_config": "Int8DynamicActivationInt8WeightConfig",
            },
            "torchao",
            "Int8DynamicActivationInt8WeightConfig",
        ),
    ],
    ids=["int8", "int4", "activations too"],
)
def test_engines_know_every_fact(
    options: dict[str, Any], method: str, words: str, facts: dict[str, str]
) -> None:
    running = Running()
    info = running.load(max_model_len=256, enable_lora=True, **options)
    assert info["quantization"] == method
    assert info["dtype"] == "bfloat16"
    assert info["quantization_note"].startswith("Quantized while it was loaded: ")
    assert words in info["quantization_note"]
    assert running.complete_all(facts) == facts
    adapter = LoRA(lora_name="demo", lora_int_id=1, lora_path=str(MODELS / "demo-lora"))
    adapted = running.run(
        running.engine.generate("adapted", GenerateParams(PARIS, GREEDY, lora_request=adapter))
    )
    assert adapted["outputs"][0]["text"] == " Lyon."
    running.stop()
