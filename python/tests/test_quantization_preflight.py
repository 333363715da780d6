"""What is found out about a quantized model before its weights are read, on copies of the demo
models whose configs say something else."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from vllm.config.cache import CacheDType
from vllm.model_executor.kernels import linear
from vllm.platforms import PlatformEnum

import checkpoints
import loading
import mixtures
from conftest import MODELS
from loading import configure as load
from vllm_bridge import quantization
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import availability

AWQ = loading.INTEGERS

Change = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with loading.environment():
        yield


@pytest.fixture
def changed(tmp_path: Path) -> Change:
    """Makes a copy of a demo model with other settings, of its quantization or of the model."""

    def change(source: str, model: dict[str, Any] | None = None, **quantization: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(MODELS / source, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= model or {}
        if quantization:
            config["quantization_config"] = config.get("quantization_config", {}) | quantization
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def refused(model: Path, **options: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        load(model, **options)
    assert "Traceback" not in caught.value.message
    return caught.value


# -- naming


@pytest.mark.parametrize(
    ("model", "names"),
    [("awq", ["awq", "AutoAWQ", "awq-marlin"]), ("gptq", ["gptq", "gptqmodel", "gptq_marlin"])],
)
def test_naming_the_own_method_selects_what_naming_nothing_does(
    model: str, names: list[str]
) -> None:
    def chosen(**options: Any) -> tuple[Any, ...]:
        config, kernel = load(MODELS / f"demo-{model}", **options)
        return kernel, config.model_config.quantization, type(config.quant_config)

    unnamed = chosen()
    assert unnamed[0] == AWQ
    for name in names:
        assert chosen(quantization=name) == unnamed


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("demo-awq", {"quantization_config": {"nbits": 3}}, "quantized already, with awq (4 bits"),
        ("demo-awq", {"quantization_config": "Int8WeightOnlyConfig"}, "quantized already"),
        ("demo", {"quantization_config": {"nbits": 3}}, '`quantization: "hqq"`'),
        (
            "demo",
            {"quantization": "fp8_per_tensor", "quantization_config": {"nbits": 3}},
            '`quantization: "fp8_per_tensor"` takes no such settings',
        ),
    ],
)
def test_settings_that_nothing_takes(model: str, options: dict[str, Any], words: str) -> None:
    error = refused(MODELS / model, **options)
    assert error.reason == "invalid_option"
    assert error.details["option"] == "quantization_config"
    assert error.message.startswith("`quantization_config` has no use here: ")
    assert words in error.message


def test_settings_of_vllms_own_are_left_to_it() -> None:
    error = refused(MODELS / "demo-awq", quantization_config={"ignore": ["lm_head"]})
    assert "vLLM says: OnlineQuantizationConfig requires at least one of" in error.message


def test_a_plain_model_has_no_kernel_of_a_quantization() -> None:
    config, kernel = load(MODELS / "demo")
    assert (config.model_config.quantization, kernel) == (None, None)


# -- methods that do nothing, or have no kernel here


@pytest.mark.parametrize(
    "method", ["int8_per_channel_weight_only", "nvfp4_per_token", "experts_int8"]
)
def test_a_method_without_effect_on_this_model(method: str) -> None:
    error = refused(MODELS / "demo", quantization=method)
    assert error.reason == "unsupported_quantization"
    assert "has no effect" in error.message


def test_layers_may_be_left_out() -> None:
    everywhere = load(MODELS / "demo", quantization="fp8_per_channel")[1]
    assert everywhere is not None
    for settings in ({"ignore": ["re:.*mlp.*"]}, {"ignore": ["*down_proj"]}):
        options = {"quantization": "fp8_per_channel", "quantization_config": settings}
        assert load(MODELS / "demo", **options)[1] in (None, everywhere)
    targets = {"targets": {"*o_proj": "fp8_per_channel"}}
    load(MODELS / "demo", quantization="online", quantization_config=targets)


def test_what_only_a_layer_by_itself_lacks_is_left_to_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_arguments: Any) -> None:
        raise AttributeError("only whole models have it")

    method = "vllm.model_executor.layers.quantization.auto_awq.AutoAWQConfig.get_quant_method"
    monkeypatch.setattr(method, fail)
    assert load(MODELS / "demo-awq")[1] is None


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4"])
def test_a_method_without_a_kernel(method: str) -> None:
    error = refused(MODELS / "demo", quantization=method)
    assert error.reason == "unsupported_quantization"
    assert f"cannot run {method} here" in error.message


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> mixtures.Made:
    return mixtures.make("w4a16", tmp_path_factory.mktemp("mixture"))


def test_a_mixture_whose_experts_are_quantized(mixture: mixtures.Made) -> None:
    assert load(mixture.quantized)[1] == AWQ
    assert load(mixture.original)[1] is None


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("int8_per_channel_weight_only", "No Int8 MoE backend"),
        ("nvfp4_per_token", "requires a Blackwell"),
        ("bitsandbytes", "does not find them"),
    ],
)
def test_a_method_that_experts_do_not_run_with(
    mixture: mixtures.Made, method: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8

    # Some CPUs have a kernel for some.
    monkeypatch.setattr(CPUExpertsInt8, "_supports_current_device", lambda: False)
    error = refused(mixture.original, quantization=method)
    assert error.reason == "unsupported_quantization"
    assert f"cannot be computed with {method} on this CPU" in error.message
    assert reason in error.message
    assert '`dtype: "int8"`' in error.message


def test_adapters_over_quantized_experts(mixture: mixtures.Made) -> None:
    error = refused(mixture.quantized, enable_lora=True)
    assert error.reason == "unsupported_quantization"
    assert "Leave out `enable_lora`" in error.message


def test_experts_of_a_checkpoint_that_do_not_run(mixture: mixtures.Made, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(mixture.quantized, folder)
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["weights"] |= {"strategy": "channel", "group_size": None}
    (folder / "config.json").write_text(json.dumps(config))
    error = refused(folder)
    assert error.reason == "unsupported_quantization"
    assert "experts of this mixture cannot be computed with compressed-tensors" in error.message
    assert "W4A16 in groups" in error.message


def test_an_operation_that_the_build_only_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4"

    def apply(*_arguments: Any) -> None:
        raise RuntimeError(text)

    for kernel in linear._POSSIBLE_KERNELS[PlatformEnum.CPU]:
        monkeypatch.setattr(kernel, "apply_weights", apply)
    availability.of_formats.cache_clear()
    error = refused(MODELS / "demo-awq")
    availability.of_formats.cache_clear()  # they are those of a build without the operation
    assert error.reason == "unsupported_quantization"
    assert error.details["exception"] == text
    assert "gptq (4 bits)" not in error.message


def test_a_look_that_fails_keeps_no_model_from_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(_layer: Any) -> bool:
        raise AttributeError("quant_method")

    monkeypatch.setattr("vllm_bridge.quantization.layers.is_quantized", renamed)
    config, kernel = load(MODELS / "demo-awq")
    assert config.model_config.quantization is not None
    assert kernel is None


def test_settings_in_a_file_of_gptqs_own_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "demo-gptq", folder)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    assert (
        load(folder)[0].model_config.quantization
        == load(MODELS / "demo-gptq")[0].model_config.quantization
    )


# -- checkpoints that the installed vLLM refuses


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"quant_method": "something-new"}, "quantized with something-new"),
    ],
)
def test_a_checkpoint_that_vllm_refuses(
    changed: Change, settings: dict[str, Any], words: str
) -> None:
    error = refused(changed("demo-gptq", **settings))
    assert error.reason == "unsupported_quantization"
    assert words in error.message
    assert "These run here: awq (4 bits), " in error.message


def compressed(bits: int, form: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "symmetric": True, "strategy": "group", "group_size": 64} | weights
    group = {"targets": ["Linear"], "weights": {"type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize(
    "settings", [compressed(3, "pack-quantized"), compressed(5, "pack-quantized")]
)
def test_weights_of_other_bits(changed: Change, settings: dict[str, Any]) -> None:
    error = refused(changed("demo", **settings))
    assert error.reason == "unsupported_quantization"
    assert "compressed-tensors (W4A16)" in error.message


@pytest.mark.parametrize("model", ["demo-awq", "demo-gptq"])
def test_a_dtype_that_the_method_does_not_compute_in(model: str) -> None:
    error = refused(MODELS / model, dtype="float32")
    assert error.reason == "unsupported_quantization"
    assert "Give `dtype` as one of float16, bfloat16" in error.message


def test_what_runs_here_is_told_by_vllm() -> None:
    assert "awq (4 bits)" in availability.formats()
    assert "mxfp4" not in availability.formats()
    assert "fp8_per_channel" in availability.online()
    assert not {"mxfp8", "experts_int8", "awq"} & set(availability.online())


def test_what_runs_here_is_found_out_without_compiling_anything() -> None:
    # A graph that was compiled before would not be again.
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for found in (availability.of_formats, availability.of_methods_online):
        found.cache_clear()
        assert found()["fp8"] is None
    assert counters["stats"]["unique_graphs"] == 0


# -- configs that do not describe their weights


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("demo-gptq", {"bits": 8}),
        ("demo-gptq", {"bits": 2}),
        ("demo-gptq", {"group_size": 64}),
        ("demo-gptq", {"group_size": -1}),
        ("demo-gptq", {"bits": 8, "group_size": 64}),
        ("demo-gptq", {"quant_method": "awq", "zero_point": True}),
        ("demo-gptq", {"bits": "four"}),
        ("demo-gptq", {"bits": None}),
        ("demo-gptq", {"group_size": 0}),
        ("demo-awq", {"bits": 8}),
        ("demo-awq", {"group_size": 32}),
        ("demo-awq", {"quant_method": "gptq"}),
        ("demo", {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}),
        ("demo-awq", {"quant_method": 4}),
        ("demo-awq", {"zero_point": False}),
    ],
)
def test_a_config_that_lies_about_its_weights(
    changed: Change, model: str, settings: dict[str, Any]
) -> None:
    assert refused(changed(model, **settings)).reason == "invalid_checkpoint"


@pytest.mark.parametrize(
    ("tensor", "value"), [("qzeros", 0x66666666), ("g_idx", 1)], ids=["symmetry", "order"]
)
def test_a_config_that_lies_about_what_vllm_does_not_look_at(
    changed: Change, tensor: str, value: int
) -> None:
    folder = changed("demo-gptq")
    checkpoint = check_model(str(folder), {})
    quantization.check(checkpoint)
    name = next(name for name in checkpoint.tensors if name.endswith(f".{tensor}"))
    place = checkpoint.tensors[name]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(place.start)
        file.write(value.to_bytes(4, "little"))
    error = refused(folder)
    assert error.reason == "invalid_checkpoint"
    assert name in error.message


@pytest.mark.parametrize(
    ("model", "settings"),
    [("demo", {"hidden_size": 512}), ("demo-awq", {"intermediate_size": 1024})],
)
def test_weights_of_another_shape_than_the_config_says(
    changed: Change, model: str, settings: dict[str, int]
) -> None:
    error = refused(changed(model, settings))
    assert error.reason == "invalid_checkpoint"
    assert "down_proj" in error.message


@pytest.mark.parametrize(
    ("model", "tensor", "dtype"),
    [
        ("demo", "model.layers.3.mlp.up_proj.weight", "I16"),
        ("demo-awq", "model.layers.5.mlp.down_proj.scales", "I16"),
    ],
)
def test_weights_that_are_no_floats(changed: Change, model: str, tensor: str, dtype: str) -> None:
    folder = changed(model)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[tensor]["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    error = refused(folder)
    assert error.reason == "invalid_checkpoint"
    assert tensor in error.message


def test_a_config_of_another_tool_that_is_right(changed: Change) -> None:
    # In the newer of GPTQ's formats zero points are stored as they are.
    folder = changed("demo-gptq", checkpoint_format="gptq_v2")
    for name, place in check_model(str(folder), {}).tensors.items():
        if name.endswith(".qzeros"):
            with (folder / "model.safetensors").open("r+b") as file:
                file.seek(place.start)
                file.write(b"\x88" * place.size)
    assert load(folder)[1] == AWQ


# -- the KV cache


def test_the_dtypes_of_the_kv_cache_are_those_of_the_attention_backend() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    supported = {*CPUAttentionBackend.supported_kv_cache_dtypes, "float16", "bfloat16"}
    for dtype in get_args(CacheDType):
        if dtype in supported:
            config, _ = load(MODELS / "demo", kv_cache_dtype=dtype)
            assert config.cache_config.cache_dtype == dtype
        else:
            error = refused(MODELS / "demo", kv_cache_dtype=dtype)
            assert error.reason == "unsupported"
            assert set(error.details["allowed"]) == supported


def test_an_fp8_cache_that_this_cpu_cannot_compute_with(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(MODELS / "demo", kv_cache_dtype="fp8", hf_overrides={"head_dim": 48})
    assert error.reason == "unsupported"
    assert error.details["allowed"] == ["auto", "float16", "bfloat16"]
    for name in ("_is_avx512_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert refused(MODELS / "demo", kv_cache_dtype="fp8").reason == "unsupported"
    assert load(MODELS / "demo", kv_cache_dtype="float16")[0].cache_config.cache_dtype == "float16"


def test_an_fp8_cache_that_the_checkpoint_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.make("w4a16", tmp_path / "made")
    config = checkpoints.read_config(tmp_path / "made")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = scheme | {"dynamic": False}
    (tmp_path / "made" / "config.json").write_text(json.dumps(config))
    if torch.cpu._is_avx512_supported():
        load(tmp_path / "made")
    for name in ("_is_avx512_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    for options in ({}, {"kv_cache_dtype": "auto"}):
        error = refused(tmp_path / "made", **options)
        assert error.reason == "unsupported"
        assert "The checkpoint's config asks for a KV cache of fp8" in error.message
        assert error.details["allowed"] == ["float16", "bfloat16"]
    load(tmp_path / "made", kv_cache_dtype="bfloat16")


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("FP8", "fp8"), ("fp8-e4m3", "fp8_e4m3"), ("e5m2", "fp8_e5m2"), ("bf16", "bfloat16")],
)
def test_other_names_of_dtypes(given: str, dtype: str) -> None:
    assert load(MODELS / "demo", kv_cache_dtype=given)[0].cache_config.cache_dtype == dtype


def test_a_dtype_that_there_is_not() -> None:
    error = refused(MODELS / "demo", kv_cache_dtype="fp9")
    assert error.reason == "invalid_option"
    assert error.details["nearest"] == "fp8"
    assert "fp8_e4m3" in error.message
    assert "fp8_inc" not in error.message
    assert refused(MODELS / "demo", kv_cache_dtype=8).details["option"] == "kv_cache_dtype"
