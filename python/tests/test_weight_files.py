"""Of several files that hold the same, vLLM's loaders read what the checks have looked at."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loading
from checkpoints import DEMO, WEIGHTS, Tensors
from loading import load
from vllm_bridge.patches import weight_files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

# Weights that stay as they are: those of linear layers are packed by the CPU's kernels.
COPIED = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(5)]


@pytest.fixture(scope="module", autouse=True)
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with loading.worker(tmp_path_factory.mktemp("ranks")):
        yield


@pytest.fixture(scope="module")
def expected(worker: None) -> Tensors:
    weights: Tensors = load(DEMO).state_dict()
    return weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo model."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def zeroed_copies(folder: Path) -> None:
    """Divides the model into two files, of which the second has copies of what is the first's."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: SHARDS["layers.5" in name] for name in tensors}
    assert {weight_map[name] for name in COPIED} == {SHARDS[0]}
    for shard in SHARDS:
        own = {name: tensors[name] for name, file in weight_map.items() if file == shard}
        if shard == SHARDS[1]:
            own |= {name: torch.zeros_like(tensors[name]) for name in COPIED}
        save_file(own, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_spelling(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    other = {f"layers.0.attention.{n}": torch.zeros_like(tensors[COPIED[0]]) for n in ("wq", "wk")}
    save_file(other, folder / "consolidated.safetensors", {"format": "pt"})


def adapter(folder: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(8, 256)}, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change", [zeroed_copies, other_spelling, adapter])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"load_format": "safetensors"},
        {"model_loader_extra_config": {"enable_multithread_load": True}},
    ],
    ids=str,
)
def test_the_model_is_the_one_that_its_folder_means(
    folder: Path, expected: Tensors, change: Callable[[Path], None], options: dict[str, Any]
) -> None:
    change(folder)
    loaded = load(folder, **options).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def test_bitsandbytes_reads_the_same(folder: Path) -> None:
    plain = load(folder, quantization="bitsandbytes").state_dict()
    zeroed_copies(folder)
    loaded = load(folder, quantization="bitsandbytes").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in plain.items())


def test_loaders_are_wrapped_once() -> None:
    from vllm.model_executor.model_loader import default_loader

    before = default_loader.safetensors_weights_iterator
    weight_files.apply()
    assert default_loader.safetensors_weights_iterator is before
