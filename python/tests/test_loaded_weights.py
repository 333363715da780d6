"""Checkpoints that lack weights, or hold others than they should, are refused where vLLM would
run: by vLLM's own loaders, without an engine."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import gguf_models
import loading
import matrix
import mixtures
import pooling_models
from checkpoints import WEIGHTS, Tensors
from conftest import MODELS
from loading import load, refused
from vllm_bridge.patches import loaded_weights

LAYER = "model.layers.3."

# Those of all kinds that take different ways through vLLM.
FEW = ("bf16", "demo-awq", "bnb-online")

SLOW = pytest.mark.slow


def slow_but(few: tuple[str, ...], names: list[str]) -> list[Any]:
    return [name if name in few else pytest.param(name, marks=SLOW) for name in names]


# Those that are loaded as others are.
ALIKE = ("bnb-fp4", "torchao-int8-dynamic", "torchao-fp8", "dtype-int8", "dtype-int4")

VARIANTS = {
    one.name: one
    for one in (matrix.Variant("bf16"), *matrix.STORED, *matrix.ONLINE)
    if one.name not in ALIKE
}


@pytest.fixture(scope="module", autouse=True)
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with loading.worker(tmp_path_factory.mktemp("ranks")):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint, made once."""
    folder = tmp_path_factory.mktemp("made")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            checkpoints.make(name, folder / name)
        return folder / name

    return make


def changed(source: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a model whose tensors were changed."""
    shutil.copytree(source, folder)
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def without(source: Path, folder: Path, name: str) -> Path:
    return changed(source, folder, lambda tensors: tensors.pop(name))


def is_harmless(name: str, tensor: str) -> bool:
    """Whether nobody reads a tensor of a variant: the order of columns that stay where they are,
    the shape of one of several matrices (all write theirs to one place), the name of a layout that
    there is only one of, and what HQQ's config says too."""
    from vllm_bridge.quantization.hqq import layers as hqq

    last = tensor.rpartition(".")[2]
    return (
        (last == "g_idx" and not name.endswith("-act"))
        or last == "weight_format"
        or (name == "hqq" and last in hqq.ABOUT)
        or bool(re.search(r"(q|k|v|gate|up)_proj\.weight_shape$", tensor))
    )


def layers(tensor: str) -> tuple[str, str]:
    """What a tensor's layer may be called in an error: as in the checkpoint, or as in vLLM, where
    a format has names for its tensors that are no parameters'."""
    own = tensor.rpartition(".")[0].removeprefix("model")
    merged = re.sub(r"\b(gate|up)_proj$", "gate_up_proj", re.sub(r"\b[qkv]_proj$", "qkv_proj", own))
    return own, merged


# Those whose tensors lie in files of safetensors.
IN_SAFETENSORS = [
    name for name in VARIANTS if name not in ("hqq-qmodel", "squeezellm", "squeezellm-sparse")
]


@pytest.mark.parametrize("name", slow_but(FEW, IN_SAFETENSORS))
def test_each_tensor_of_a_checkpoint_is_missed(
    made: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    variant = VARIANTS[name]
    whole = made(variant.checkpoint)
    expected = load(whole, **variant.options).state_dict()
    modules = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm")
    starts = (
        *(f"{LAYER}{module}." for module in modules),
        "model.norm.",
        "model.embed_tokens.",
        "lm_head.",
    )
    tensors = [tensor for tensor in load_file(whole / WEIGHTS) if tensor.startswith(starts)]
    assert len(tensors) >= len(starts)
    for index, tensor in enumerate(tensors):
        model = without(whole, tmp_path / str(index), tensor)
        if is_harmless(name, tensor):
            loaded = load(model, **variant.options).state_dict()
            for parameter, value in expected.items():
                assert parameter.endswith("_shape") or torch.equal(loaded[parameter], value)
        else:
            error = refused(model, **variant.options)
            assert error.reason == "invalid_checkpoint", tensor
            assert any(layer in error.message for layer in layers(tensor)), tensor


@pytest.mark.parametrize(
    "method", ["plain", *(pytest.param(name, marks=SLOW) for name in ("torchao", "fp8"))]
)
def test_each_tensor_of_an_expert_is_missed(tmp_path: Path, method: str) -> None:
    options = {} if method == "plain" else {"quantization": method}
    whole = mixtures.write(tmp_path / "whole", *mixtures.mixtral())
    load(whole, **options)
    mixture = LAYER + "block_sparse_moe."
    for tensor, named in (
        ("experts.2.w1.weight", "w13_weight (expert 2)"),
        ("experts.0.w2.weight", "w2_weight (expert 0)"),
        ("experts.3.w3.weight", "w13_weight (expert 3)"),
        ("gate.weight", "gate.weight"),
    ):
        error = refused(without(whole, tmp_path / named, mixture + tensor), **options)
        assert error.reason == "invalid_checkpoint"
        assert named in error.message


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bf16", "self_attn.k_proj.weight"),
        ("bf16", "mlp.up_proj.weight"),
        ("demo-awq", "self_attn.v_proj.qweight"),
        ("demo-awq", "mlp.gate_proj.qzeros"),
        pytest.param("demo-gptq", "self_attn.q_proj.qweight", marks=SLOW),
        pytest.param("w4a16", "mlp.up_proj.weight_packed", marks=SLOW),
        pytest.param("fp8-tensor", "self_attn.k_proj.weight_scale", marks=SLOW),
        pytest.param("bnb-online", "mlp.gate_proj.weight", marks=SLOW),
    ],
)
def test_a_tensor_that_all_layers_lack_is_missed(
    made: Callable[[str], Path], tmp_path: Path, name: str, part: str
) -> None:
    def change(tensors: Tensors) -> None:
        for tensor in [tensor for tensor in tensors if tensor.endswith(part)]:
            del tensors[tensor]

    variant = VARIANTS[name]
    model = changed(made(variant.checkpoint), tmp_path / "model", change)
    error = refused(model, **variant.options)
    assert error.reason == "invalid_checkpoint"
    assert f"model.layers.0.{part}" in error.message


def test_a_matrix_that_all_experts_lack_is_missed(tmp_path: Path) -> None:
    whole = mixtures.write(tmp_path / "whole", *mixtures.mixtral())

    def change(tensors: Tensors) -> None:
        for tensor in [tensor for tensor in tensors if tensor.endswith(".w3.weight")]:
            del tensors[tensor]

    error = refused(changed(whole, tmp_path / "torn", change))
    assert error.reason == "invalid_checkpoint"
    assert "w13_weight (expert 0)" in error.message


@SLOW
@pytest.mark.parametrize("name", list(mixtures.VARIANTS))
def test_each_tensor_of_a_quantized_expert_is_missed(tmp_path: Path, name: str) -> None:
    whole = mixtures.make(name, tmp_path / "made").quantized
    load(whole)
    tensors = [tensor for tensor in load_file(whole / WEIGHTS) if f"{LAYER}" in tensor]
    tensors = [tensor for tensor in tensors if ".experts.2." in tensor]
    assert len(tensors) >= 3
    for index, tensor in enumerate(tensors):
        # What several tensors write to one place is there with one of them.
        if tensor.endswith((".g_idx", "_shape", "w1.input_scale", "w3.input_scale")):
            continue
        error = refused(without(whole, tmp_path / str(index), tensor))
        assert error.reason == "invalid_checkpoint", tensor
        assert "(expert 2)" in error.message or ".experts.2." in error.message


def test_a_head_that_is_tied_is_not_missed(tmp_path: Path) -> None:
    config = checkpoints.read_config(checkpoints.DEMO) | {"tie_word_embeddings": True}
    tensors = load_file(checkpoints.DEMO / WEIGHTS)
    del tensors["lm_head.weight"]
    load(checkpoints.write(tmp_path / "tied", tensors, config))


def test_biases_are_missed(tmp_path: Path) -> None:
    config = checkpoints.read_config(checkpoints.DEMO) | {"attention_bias": True}
    tensors = load_file(checkpoints.DEMO / WEIGHTS)
    for name, tensor in list(tensors.items()):
        if "self_attn" in name:
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(len(tensor))
    load(checkpoints.write(tmp_path / "whole", tensors, config))
    for part in ("k_proj", "o_proj"):
        name = f"{LAYER}self_attn.{part}.bias"
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        assert name in refused(checkpoints.write(tmp_path / part, rest, config)).message


def test_what_vllm_is_told_not_to_look_at(made: Callable[[str], Path], tmp_path: Path) -> None:
    torn = without(made("demo"), tmp_path / "torn", LAYER + "self_attn.q_proj.weight")
    load(torn, model_loader_extra_config={"enable_weights_track": False})
    load(torn, load_format="dummy")


@pytest.mark.parametrize("name", slow_but(("classifier",), ["classifier", "cross-encoder", "wide"]))
def test_models_that_pool_are_whole(tmp_path: Path, name: str) -> None:
    pooling_models.make_all(tmp_path)
    load(tmp_path / name, runner="pooling")


# -- what is there, and is something else


def damaged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan") if "weight" in name else float("inf")
    return tensor


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bf16", "weight"),
        ("demo-awq", "scales"),
        pytest.param("demo-gptq", "scales", marks=SLOW),
        pytest.param("w4a16", "weight_scale", marks=SLOW),
        pytest.param("w8a8", "weight_scale", marks=SLOW),
        pytest.param("fp8-tensor", "weight_scale", marks=SLOW),
        pytest.param("fp8-block", "weight_scale_inv", marks=SLOW),
        pytest.param("fp8-online", "weight", marks=SLOW),
        ("bnb-nf4", "weight.absmax"),
        pytest.param("bnb-int8", "SCB", marks=SLOW),
        pytest.param("bnb-online", "weight", marks=SLOW),
    ],
)
def test_what_is_no_number(
    made: Callable[[str], Path], tmp_path: Path, name: str, part: str
) -> None:
    variant = VARIANTS[name]
    tensor = f"{LAYER}mlp.up_proj.{part}"

    def change(tensors: Tensors) -> None:
        tensors[tensor] = damaged(part, tensors[tensor])

    model = changed(made(variant.checkpoint), tmp_path / "model", change)
    error = refused(model, **variant.options)
    assert error.reason == "invalid_checkpoint"
    assert "finite" in error.message
    assert "3.mlp.gate_up_proj" in error.message


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bf16", "weight"),
        ("demo-awq", "qzeros"),
        pytest.param("demo-gptq", "qweight", marks=SLOW),
        pytest.param("w4a16", "weight_packed", marks=SLOW),
        pytest.param("w8a8", "weight_scale", marks=SLOW),
        pytest.param("fp8-tensor", "weight", marks=SLOW),
        pytest.param("fp8-block", "weight_scale_inv", marks=SLOW),
        ("bnb-nf4", "weight"),
        pytest.param("bnb-int8", "weight", marks=SLOW),
        ("bnb-online", "weight"),
    ],
)
@pytest.mark.parametrize("module", ["self_attn.k_proj", "mlp.down_proj"])
def test_a_tensor_of_another_shape(
    made: Callable[[str], Path], tmp_path: Path, name: str, part: str, module: str
) -> None:
    variant = VARIANTS[name]
    tensor = f"{LAYER}{module}.{part}"

    def change(tensors: Tensors) -> None:
        tensors[tensor] = tensors[tensor][: len(tensors[tensor]) // 2].clone()

    error = refused(
        changed(made(variant.checkpoint), tmp_path / "model", change), **variant.options
    )
    assert error.reason == "invalid_checkpoint"
    assert f"`{tensor}`" in error.message


@pytest.mark.parametrize(
    ("name", "part", "dtype"),
    [
        ("demo-awq", "qweight", torch.float32),
        ("demo-awq", "scales", torch.int16),
        pytest.param("demo-gptq", "qzeros", torch.float32, marks=SLOW),
        pytest.param("w4a16", "weight_packed", torch.float32, marks=SLOW),
        pytest.param("w4a16", "weight_scale", torch.int16, marks=SLOW),
        pytest.param("w8a8", "weight", torch.bfloat16, marks=SLOW),
        pytest.param("fp8-tensor", "weight", torch.bfloat16, marks=SLOW),
        pytest.param("fp8-block", "weight", torch.int8, marks=SLOW),
        ("bnb-nf4", "weight", torch.float16),
        pytest.param("bnb-int8", "weight", torch.float16, marks=SLOW),
        ("bf16", "weight", torch.float8_e4m3fn),
    ],
)
def test_a_tensor_of_another_dtype(
    made: Callable[[str], Path], tmp_path: Path, name: str, part: str, dtype: torch.dtype
) -> None:
    variant = VARIANTS[name]
    tensor = f"{LAYER}self_attn.v_proj.{part}"

    def change(tensors: Tensors) -> None:
        tensors[tensor] = tensors[tensor].to(dtype)

    error = refused(
        changed(made(variant.checkpoint), tmp_path / "model", change), **variant.options
    )
    assert error.reason == "invalid_checkpoint"
    assert tensor in error.message


def test_bitsandbytes_computes_in_two_bytes(made: Callable[[str], Path]) -> None:
    for model, options in (
        (made("demo"), {"quantization": "bitsandbytes"}),
        (made("bnb-nf4"), {}),
    ):
        error = refused(model, dtype="float32", **options)
        assert error.reason == "unsupported_quantization"
        assert error.details["option"] == "dtype"


Lie = Callable[[dict[str, Any]], object]


def weights_of(**settings: Any) -> Lie:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(settings)


def activations_of(**settings: Any) -> Lie:
    return lambda config: config["config_groups"]["group_0"]["input_activations"].update(settings)


def says(**settings: Any) -> Lie:
    return lambda config: config.update(settings)


def leaves_out(name: str) -> Lie:
    return lambda config: config.pop(name)


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("w4a16", weights_of(symmetric=False)),
        ("w4a16", weights_of(group_size=64)),
        ("w4a16", weights_of(strategy="channel", group_size=None)),
        ("w4a16", leaves_out("quant_method")),
        ("w4a16", says(config_groups={})),
        ("w4a16", says(ignore=["lm_head", "model.layers.1.mlp.down_proj"])),
        ("w4a16-asym", weights_of(symmetric=True)),
        ("w8a8", weights_of(num_bits=4)),
        ("w8a8", weights_of(strategy="tensor")),
        ("w8a8", weights_of(type="float")),
        ("fp8-dynamic", weights_of(type="int")),
        ("fp8-dynamic", activations_of(dynamic=False, strategy="tensor")),
        ("fp8-static", activations_of(dynamic=True, strategy="token")),
        ("fp8-tensor", says(activation_scheme="static")),
        ("fp8-tensor", says(weight_block_size=[128, 128])),
        ("fp8-tensor", leaves_out("quant_method")),
        ("fp8-block", says(weight_block_size=[64, 64])),
        ("fp8-block", leaves_out("weight_block_size")),
        ("demo-awq", leaves_out("quant_method")),
        ("demo-gptq", leaves_out("quant_method")),
        ("auto-round", says(group_size=64)),
        ("auto-round", says(packing_format="auto_round:auto_awq")),
        ("bnb-nf4", says(load_in_4bit=False, load_in_8bit=True)),
        ("bnb-nf4", says(llm_int8_skip_modules=["down_proj"])),
        ("bnb-int8", says(load_in_4bit=True, load_in_8bit=False)),
    ],
)
def test_a_config_that_lies(
    made: Callable[[str], Path], tmp_path: Path, name: str, lie: Lie
) -> None:
    config = checkpoints.read_config(made(name))
    lie(config["quantization_config"])
    model = checkpoints.write(tmp_path / "model", load_file(made(name) / WEIGHTS), config)
    assert refused(model).reason == "invalid_checkpoint"


# -- the watch itself


def test_loaders_are_watched_once() -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    before = BaseModelLoader.load_model
    loaded_weights.apply()
    assert BaseModelLoader.load_model is before


@pytest.mark.parametrize("overrides", [{"num_hidden_layers": 1}, {"hidden_size": 128}])
@pytest.mark.parametrize("form", ["demo", "Q8_0"])
def test_a_config_that_the_user_changed_is_told_before_the_files(
    tmp_path: Path, form: str, overrides: dict[str, Any]
) -> None:
    model = MODELS / form if form == "demo" else gguf_models.make(form, tmp_path)
    error = refused(model, hf_overrides=overrides)
    assert error.reason == "invalid_checkpoint"
    assert error.details["option"] == "hf_overrides"
    (name,) = overrides
    assert error.remedy.startswith(f"`hf_overrides` ({name}) changes what the model's config says")
    assert "leave the option out" in error.remedy
