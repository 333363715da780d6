import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import MODELS
from vllm_bridge import checkpoints
from vllm_bridge.checkpoints import files, fit
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.memory import GIB

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    return model


def tensors(
    path: Path, *, name: str = "weight", elements: int = 4, dtype: str = "BF16", cut: int = 0
) -> None:
    """A safetensors file with one tensor of zeros, sparse, and ``cut`` bytes short."""
    size = elements * {"F32": 4, "BF16": 2, "I32": 4}[dtype]
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            name: {"dtype": dtype, "shape": [1, elements], "data_offsets": [0, size]},
        }
    ).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size - cut)


def refused(model: Path | str, options: dict[str, Any] | None = None) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        check_model(str(model), options or {})
    return caught.value


def test_a_good_folder(folder: Path) -> None:
    tensors(folder / "model.safetensors", elements=10)
    checkpoint = check_model(str(folder), {})
    assert checkpoint.folder == str(folder)
    assert checkpoint.files == ("model.safetensors",)
    assert checkpoint.config == LLAMA
    assert fit.loaded_bytes(checkpoint, {}) == 20
    (name, tensor), *rest = checkpoint.tensors.items()
    assert (name, tensor.dtype, tensor.shape, tensor.size, rest) == (
        "weight",
        "BF16",
        (1, 10),
        20,
        [],
    )
    assert tensor.start + tensor.size == (folder / "model.safetensors").stat().st_size
    assert checkpoint.quant_method is None


@pytest.mark.parametrize(
    "name", ["./missing", "/no/such/folder", "../a/b/c", "~/models/x", ".x", "/no\0such/folder"]
)
def test_a_path_that_does_not_exist(name: str) -> None:
    error = refused(name)
    assert error.reason == "model_not_found"
    assert name in error.message


def test_a_folder_of_a_similar_name_is_suggested(folder: Path) -> None:
    assert f"Did you mean `{folder}`?" in refused(folder.with_name("mode")).message


def test_no_name() -> None:
    assert refused("").reason == "model_not_found"


def test_storage_that_only_vllm_knows_is_left_to_it() -> None:
    assert check_model("s3://bucket/model", {}) == Checkpoint()


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://hf.co/org/name/tree/main", "org/name"),
        ("http://localhost", "org/name"),
    ],
)
def test_the_address_of_a_page_is_no_model(address: str, name: str) -> None:
    error = refused(address)
    assert error.reason == "model_not_found"
    assert error.remedy.endswith(f"`{name}`.")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "is empty"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter"),
        (["notes.txt"], "no `config.json`"),
        (["inner/config.json"], "inner"),
    ],
)
def test_folders_that_are_no_models(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    error = refused(tmp_path)
    assert error.reason == "not_a_model"
    assert words in error.message


def test_a_file_is_no_model(folder: Path) -> None:
    assert refused(folder / "config.json").reason == "not_a_model"


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_a_config_that_cannot_be_read(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert refused(folder).reason == "not_a_model"


def test_another_config_may_be_named(tmp_path: Path) -> None:
    tensors(tmp_path / "model.safetensors")
    found = check_model(str(tmp_path), {"hf_config_path": "elsewhere"})
    assert fit.loaded_bytes(found, {}) == 8


def test_no_weights(folder: Path) -> None:
    error = refused(folder)
    assert error.reason == "invalid_checkpoint"
    assert not check_model(str(folder), {"load_format": "dummy"}).tensors


def test_weights_of_another_format_are_left_to_vllm(folder: Path) -> None:
    (folder / "pytorch_model.bin").touch()
    assert check_model(str(folder), {}).files == ()


@pytest.mark.parametrize("cut", [1, 4, -4])
def test_a_file_of_another_length_than_its_header_says(folder: Path, cut: int) -> None:
    tensors(folder / "model.safetensors", cut=cut)
    error = refused(folder)
    assert error.reason == "invalid_checkpoint"
    assert error.details["file"].endswith("model.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"\xff" * 8,
        struct.pack("<Q", 5) + b"[1,2]",
        struct.pack("<Q", 9) + b"{",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_a_header_that_is_none(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert refused(folder).reason == "invalid_checkpoint"


def test_a_tensor_of_another_size_than_its_shape_says(folder: Path) -> None:
    header = json.dumps(
        {"weight": {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 16]}}
    ).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(16)
    (folder / "model.safetensors").write_bytes(content)
    error = refused(folder)
    assert error.reason == "invalid_checkpoint"
    assert "`weight` has 16 bytes for [4, 4]" in error.message


def test_a_missing_shard(folder: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors(folder / names[0], name="a")
    error = refused(folder)
    assert error.reason == "invalid_checkpoint"
    assert error.details["missing"] == [names[1]]
    tensors(folder / names[1], name="b")
    assert check_model(str(folder), {}).files == tuple(names)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert refused(folder).reason == "invalid_checkpoint"


def test_a_shard_without_what_the_index_says_is_in_it(folder: Path) -> None:
    def index(*names: str) -> None:
        weight_map = dict.fromkeys(["weight", *names], "model.safetensors")
        text = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)

    tensors(folder / "model.safetensors")
    index("model.norm.weight", "layers.3.q.weight")
    error = refused(folder)
    assert error.reason == "invalid_checkpoint"
    assert error.details["missing"] == ["layers.3.q.weight"]
    for harmless in (["lm_head.weight"], ["layers.3.inv_freq", "a"], ["layers.1.x", "layers.2.x"]):
        index(*harmless)
        assert check_model(str(folder), {}).files == ("model.safetensors",)


# -- files that hold the same


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_the_index_decides_which_copy_of_a_tensor_is_meant(folder: Path) -> None:
    for shard in SHARDS:
        tensors(folder / shard)
    index = folder / "model.safetensors.index.json"
    for shard in SHARDS:
        index.write_text(
            json.dumps({"weight_map": {"weight": shard, "a": SHARDS[0], "b": SHARDS[1]}})
        )
        checkpoint = check_model(str(folder), {})
        assert checkpoint.tensors["weight"].file == str(folder / shard)
        (other,) = set(SHARDS) - {shard}
        paths = [str(folder / name) for name in SHARDS]
        assert files.strays(paths) == {str(folder / other): {"weight"}}
    for weight_map in (
        {"a": SHARDS[0], "b": SHARDS[1]},  # says nothing of it
        {"weight": "model.safetensors", "a": SHARDS[0], "b": SHARDS[1]},  # says what is not so
    ):
        tensors(folder / "model.safetensors", name="other")
        index.write_text(json.dumps({"weight_map": weight_map}))
        error = refused(folder)
        assert error.reason == "invalid_checkpoint"
        assert all(shard in error.message for shard in SHARDS)
        assert error.details["files"] == list(SHARDS)
        assert error.details["tensor"] == "weight"


@pytest.mark.parametrize("leftover", ["consolidated.safetensors", "model-fp16.safetensors"])
def test_without_an_index_no_copy_is_the_right_one(folder: Path, leftover: str) -> None:
    tensors(folder / "model.safetensors")
    tensors(folder / leftover)
    error = refused(folder)
    assert error.reason == "invalid_checkpoint"
    assert "model.safetensors" in error.message
    assert leftover in error.message
    index = {"weight_map": {"weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_model(str(folder), {}).files == ("model.safetensors",)


HUGGING_FACE, MISTRAL = "model.safetensors", "consolidated.safetensors"


@pytest.mark.parametrize(
    ("params", "options", "file", "load_format"),
    [
        (False, {}, HUGGING_FACE, "hf"),
        (True, {}, MISTRAL, "mistral"),
        (True, {"config_format": "hf"}, HUGGING_FACE, "hf"),
        (False, {"config_format": "mistral"}, MISTRAL, "mistral"),
        (False, {"load_format": "mistral"}, MISTRAL, "mistral"),
        (True, {"load_format": "safetensors"}, HUGGING_FACE, "safetensors"),
        (True, {"load_format": "hf"}, HUGGING_FACE, "hf"),
    ],
)
def test_of_both_spellings_of_mistrals_folders_the_one_of_the_format_is_read(
    folder: Path, params: bool, options: dict[str, Any], file: str, load_format: str
) -> None:
    tensors(folder / HUGGING_FACE, name="model.layers.0.self_attn.q_proj.weight")
    tensors(folder / MISTRAL, name="layers.0.attention.wq.weight")
    if params:
        (folder / "params.json").write_text("{}")
    checkpoint = check_model(str(folder), options)
    assert checkpoint.files == (file,)
    assert checkpoint.load_format == load_format
    assert {tensor.file for tensor in checkpoint.tensors.values()} == {str(folder / file)}


def test_mistrals_weights_may_be_the_only_ones(folder: Path) -> None:
    tensors(folder / "consolidated.safetensors")
    checkpoint = check_model(str(folder), {})
    assert checkpoint.files == ("consolidated.safetensors",)
    assert checkpoint.load_format == "mistral"


def test_an_adapter_in_a_models_folder_is_none_of_its_weights(folder: Path) -> None:
    tensors(folder / "model.safetensors")
    tensors(folder / "adapter_model.safetensors", name="base_model.model.lora_A.weight")
    assert check_model(str(folder), {}).files == ("model.safetensors",)
    (folder / "model.safetensors").unlink()
    assert "no weights" in refused(folder).message


# -- the memory


def fitting(folder: Path, options: dict[str, Any]) -> None:
    """Looks whether a model fits into 8 GiB."""
    fit.check_memory(check_model(str(folder), options), options, 8 * GIB, "memory")


def too_large(folder: Path, options: dict[str, Any] | None = None) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        fitting(folder, options or {})
    assert caught.value.reason == "out_of_memory"
    return caught.value


@pytest.mark.parametrize(
    ("dtype", "elements", "options", "needed"),
    [
        ("BF16", 5 * GIB, {}, 10 * GIB),
        ("F32", 5 * GIB, {}, 10 * GIB),
        ("F32", 3 * GIB, {}, None),
        ("BF16", 3 * GIB, {"dtype": "float32"}, 12 * GIB),
        ("BF16", 3 * GIB, {"dtype": "bfloat16"}, None),
        ("BF16", 5 * GIB, {"quantization": "fp8"}, None),
        ("BF16", 9 * GIB, {"quantization": "fp8"}, 9 * GIB),
        ("BF16", 14 * GIB, {"quantization": "bitsandbytes"}, None),
        ("BF16", 16 * GIB, {"quantization": "bitsandbytes"}, 9 * GIB),
        # It quantizes what has been loaded.
        ("BF16", 5 * GIB, {"quantization": "torchao"}, 10 * GIB),
        # A spelling that is understood later.
        ("BF16", 15 * GIB, {"quantization": "BnB"}, None),
        ("I32", 3 * GIB, {}, 12 * GIB),
    ],
)
def test_a_model_that_is_larger_than_the_memory(
    folder: Path, dtype: str, elements: int, options: dict[str, Any], needed: int | None
) -> None:
    tensors(folder / "model.safetensors", elements=elements, dtype=dtype)
    assert (folder / "model.safetensors").stat().st_blocks < 100
    if needed is None:
        fitting(folder, options)
        return
    error = too_large(folder, options)
    assert error.details == {"needed_bytes": needed, "available_bytes": 8 * GIB}
    assert f"need {needed // GIB}.0 GiB and 8.0 GiB of memory" in error.message


def test_advice_fits_the_model(folder: Path) -> None:
    tensors(folder / "model.safetensors", elements=5 * GIB)
    assert "awq (4 bits)" in too_large(folder).message
    assert "bfloat16" in too_large(folder, {"dtype": "float32"}).message
    assert "int4" in too_large(folder, {"quantization": "torchao"}).message
    quantized = LLAMA | {"quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(quantized))
    assert "quantized variant" not in too_large(folder).message


# -- quantization


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": None}, None),
        ({}, None),
    ],
)
def test_where_a_config_names_its_quantization(config: dict[str, Any], method: str | None) -> None:
    assert Checkpoint(config=config).quant_method == method


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq (4 bits, groups of 128)"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": -1}, "awq (4 bits, no groups)"),
        (
            {"quant_method": "gptq", "bits": 8, "sym": False, "desc_act": True},
            "gptq (8 bits, asymmetric, desc_act)",
        ),
        ({"load_in_8bit": True}, "bitsandbytes (load_in_8bit)"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_a_quantization_in_words(config: dict[str, Any], words: str) -> None:
    assert Checkpoint(config={"quantization_config": config}).description == words


@pytest.mark.parametrize("value", [5, "x", [], [5], [[]], {"0": "x"}])
def test_a_config_with_fields_of_other_types(value: Any) -> None:
    checkpoint = Checkpoint(config={"architectures": value, "text_config": value})
    assert (checkpoint.architecture, checkpoint.quantization, checkpoint.dtype) == (None,) * 3


@pytest.mark.parametrize("value", ["awq", 4, [], {"quant_method": 4}, {"quant_method": None}])
def test_a_quantization_that_names_no_method(folder: Path, value: Any) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": value}))
    tensors(folder / "model.safetensors")
    error = refused(folder)
    assert error.reason == "invalid_checkpoint"
    assert "quant_method" in error.message


def test_paths_are_found_from_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors(folder / "model.safetensors")
    monkeypatch.chdir(folder.parent)
    assert check_model("model", {}).folder == "model"
    assert os.path.isdir("model")


def test_a_model_is_looked_at_without_what_takes_seconds_to_import() -> None:
    script = """
import pkgutil, sys
from vllm_bridge import checkpoints
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.quantization import check
for module in pkgutil.iter_modules(checkpoints.__path__, "vllm_bridge.checkpoints."):
    __import__(module.name)
check(check_model(sys.argv[1], {}))
heavy = {"torch", "vllm", "transformers", "huggingface_hub", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    python = Path(checkpoints.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", script, MODELS / "demo"],
        check=True,
        env=os.environ | {"PYTHONPATH": str(python)},
    )
