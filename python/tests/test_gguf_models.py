"""The GGUF files that tests are made with are what llama.cpp makes."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

import gguf_models


@pytest.mark.parametrize("model", [gguf_models.demo, gguf_models.mixture, gguf_models.qwen2])
def test_a_file_holds_the_model(model: Callable[[], gguf_models.Model], tmp_path: Path) -> None:
    made = model()
    weights = gguf_models.unpack(gguf_models.write(made, "BF16", tmp_path))
    assert weights.keys() == made.tensors.keys()
    for name, tensor in weights.items():
        assert tensor.equal(made.tensors[name].float()), name


def test_a_file_of_several_types_has_those_of_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("libgguf")
    reader = gguf.GGUFReader(gguf_models.make("Q4_K_M", tmp_path))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[f"blk.{layer}.attn_v.weight"] for layer in (0, 1, 3, 4)} == {"Q4_K"}
    assert {types[f"blk.{layer}.ffn_down.weight"] for layer in (2, 5)} == {"Q6_K"}
    assert (types["output.weight"], types["output_norm.weight"]) == ("Q6_K", "F32")


def test_a_model_in_parts_has_each_tensor_once(tmp_path: Path) -> None:
    first = gguf_models.write(gguf_models.demo(), "Q8_0", tmp_path, parts=3)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"demo-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert first == parts[0]
    readers = [gguf.GGUFReader(part) for part in parts]
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    whole = gguf.GGUFReader(gguf_models.make("Q8_0", tmp_path))
    assert names == [tensor.name for tensor in whole.tensors]
