"""What names of quantization methods mean, by the installed vLLM's registry."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import naming, registry

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def quantized(method: str | None, **checkpoint: Any) -> Checkpoint:
    config = LLAMA if method is None else LLAMA | {"quantization_config": {"quant_method": method}}
    return Checkpoint(config=config, **checkpoint)


def refused(checkpoint: Checkpoint, asked: str | None = None, **arguments: Any) -> BridgeError:
    if asked is not None:
        arguments["quantization"] = asked
    with pytest.raises(BridgeError) as caught:
        naming.check(checkpoint, arguments)
    assert caught.value.reason == "unsupported_quantization"
    return caught.value


@pytest.fixture
def no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    extras = [name for extra in registry.extras().values() for name in extra.modules.values()]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in extras else real(name)
    )


@pytest.mark.parametrize(
    ("own", "names"),
    [
        ("awq", ["awq", "AWQ", " awq ", "auto_awq", "auto-awq", "autoawq", "awq_marlin"]),
        (
            "gptq",
            ["gptq", "GPTQ", "auto_gptq", "auto-gptq", "AutoGPTQ", "gptqmodel", "gptq-marlin"],
        ),
        ("compressed-tensors", ["compressed-tensors", "compressed_tensors", "llm-compressor"]),
        ("auto-round", ["auto-round", "auto_round", "autoround", "inc"]),
        ("fp8", ["fp8", "FP8", "float8"]),
    ],
)
def test_naming_the_checkpoints_own_method_leaves_the_choice_of_kernel_to_vllm(
    own: str, names: list[str]
) -> None:
    for name in names:
        arguments = {"quantization": name, "dtype": "auto"}
        naming.check(quantized(own), arguments)
        assert arguments == {"dtype": "auto"}, name


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("FP8", "fp8"),
        ("fp8-per-channel", "fp8_per_channel"),
        ("compressed_tensors", "compressed-tensors"),
        ("bnb", "bitsandbytes"),
        ("BitsAndBytes", "bitsandbytes"),
        ("nf4", "bitsandbytes"),
        ("TorchAO", "torchao"),
        ("nvfp4", "modelopt_fp4"),
        ("awk", None),
        ("", None),
    ],
)
def test_spellings_and_other_names(name: str, method: str | None) -> None:
    assert naming.resolve(name) == method


def test_other_names_are_of_methods_and_hide_none() -> None:
    methods = [*naming.methods(), *registry.extras()]
    others = registry.other_names()
    assert set(others.values()) <= set(methods)
    assert not set(others) & {method.lower().replace("_", "-") for method in methods}


def test_every_method_of_vllm_is_known_by_its_own_name() -> None:
    assert "awq" in naming.methods()
    for method in naming.methods():
        assert naming.resolve(method) == method
        assert naming.resolve(method.upper().replace("_", "-")) == method


@pytest.mark.parametrize(
    ("own", "asked"),
    [("awq", "gptq"), ("gptq", "AWQ"), ("fp8", "compressed-tensors"), ("gptq", "fp8_per_channel")],
)
def test_a_name_that_is_not_the_checkpoints(own: str, asked: str) -> None:
    error = refused(quantized(own), asked)
    assert f'Write `quantization: "{own}"`' in error.message
    assert f"quantized with {own}" in error.message
    assert error.details["checkpoint"] == own


def test_a_method_that_takes_anothers_checkpoints_is_vllms_to_choose() -> None:
    config = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "group_size": 128}
    arguments = {"quantization": "moe_wna16"}
    naming.check(Checkpoint(config=LLAMA | {"quantization_config": config}), arguments)
    assert arguments == {"quantization": "moe_wna16"}


@pytest.mark.parametrize(
    ("asked", "near"), [("awk", "awq"), ("gptqmodl", "gptq"), ("bitsandbyte", "bitsandbytes")]
)
def test_a_method_that_vllm_does_not_have(asked: str, near: str) -> None:
    error = refused(quantized(None), asked)
    assert error.details["nearest"] == near
    assert f"Did you mean `{near}`?" in error.message
    assert "compressed-tensors" in error.message


def test_a_checkpoint_of_a_method_that_vllm_does_not_have() -> None:
    error = refused(quantized("made-up"))
    assert "quantized with made-up" in error.message
    assert "These run here: " in error.message


@pytest.mark.usefixtures("no_extras")
@pytest.mark.parametrize("method", list(registry.extras()))
def test_a_method_without_its_packages_names_the_set_up(method: str, tmp_path: Path) -> None:
    for error in (
        refused(quantized(None, folder=str(tmp_path)), method),
        refused(quantized(method)),
        refused(quantized(method), method),
    ):
        assert f"`mix vllm.setup --with {method}`" in error.message
        assert error.details["extra"] == method
    if method == "bitsandbytes":
        assert refused(quantized(None), load_format=method).details["extra"] == method
        old = Checkpoint(config=LLAMA | {"quantization_config": {"load_in_4bit": True}})
        assert refused(old).details["extra"] == method


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "inc", "modelopt"])
def test_a_method_that_needs_a_quantized_checkpoint(tmp_path: Path, method: str) -> None:
    error = refused(quantized(None, folder=str(tmp_path)), method)
    assert "not quantized" in error.message


def test_a_config_of_the_users_own_stands_for_the_checkpoints(tmp_path: Path) -> None:
    plain = quantized(None, folder=str(tmp_path))
    overrides = {"quantization_config_dict_json": "{}"}
    arguments = {"quantization": "auto_gptq", "hf_overrides": overrides}
    naming.check(plain, arguments)
    assert arguments["quantization"] == "auto_gptq"


def test_methods_that_need_none(tmp_path: Path) -> None:
    plain = quantized(None, folder=str(tmp_path))
    for method in ("fp8", "fp8_per_channel", "experts_int8"):
        naming.check(plain, {"quantization": method})
    (tmp_path / "quantize_config.json").touch()
    naming.check(plain, {"quantization": "awq"})
