"""The GGUF files that tests are made with are what llama.cpp makes."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

import gguf_models
from checkpoints import DEMO
from conftest import NEEDS_LIBGGUF

SAID = json.loads(gguf_models.LLAMA_CPP.read_text(encoding="utf-8"))
QUICK = ("demo-F16", "demo-Q8_0", "demo-Q4_K_M", "qwen2-Q4_K_M")

Make = Callable[[], gguf_models.Model]
MODELS: tuple[Make, ...] = (gguf_models.demo, gguf_models.mixture, gguf_models.qwen2)


def each() -> list[Any]:
    """A parameter for each model and type that llama.cpp was asked."""
    names = [(make, type) for make in MODELS for type in SAID[make.__name__]]
    return [pytest.param(*name, id=_id(*name), marks=[*_marks(*name)]) for name in names]


def _id(make: Make, type: str) -> str:
    return f"{make.__name__}-{type}"


def _marks(make: Make, type: str) -> Iterator[pytest.MarkDecorator]:
    if _id(make, type) not in QUICK:
        yield pytest.mark.slow
    if gguf_models.takes_libgguf(type):
        yield NEEDS_LIBGGUF


@pytest.mark.parametrize(("make", "type"), each())
def test_a_file_is_to_the_last_byte_what_llama_cpp_makes(
    make: Make, type: str, tmp_path: Path
) -> None:
    file = gguf_models.write(make(), type, tmp_path)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SAID[make.__name__][type]["sha256"]


def test_llama_cpp_says_everything_in_every_type() -> None:
    assert set(SAID["demo"]) == set(gguf_models.TYPES)
    for type in SAID["demo"]:
        assert gguf_models.answers("demo", type).otherwise == {}, type


def test_llama_cpp_s_log_probabilities_are_one_for_each_token() -> None:
    facts = (DEMO.parent / "facts.tsv").read_text(encoding="utf-8").splitlines()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = [tokenizer.encode(fact.replace("\t", "")).ids for fact in facts]
    assert SAID["tokens"] == ids
    exact = gguf_models.answers("demo", "F32").logprobs
    for type in gguf_models.TYPES:
        logprobs = gguf_models.answers("demo", type).logprobs
        assert len(logprobs) == sum(len(text) - 1 for text in ids)
        # The model in fewer bits, and no other one.
        assert np.abs(logprobs - exact).mean() < 0.2, type


@pytest.mark.parametrize("model", MODELS)
def test_a_file_holds_the_model(model: Make, tmp_path: Path) -> None:
    made = model()
    weights = gguf_models.unpack(gguf_models.write(made, "BF16", tmp_path))
    assert weights.keys() == made.tensors.keys()
    for name, tensor in weights.items():
        assert tensor.equal(made.tensors[name].float()), name


@NEEDS_LIBGGUF
def test_a_file_of_several_types_has_those_of_llama_cpp(tmp_path: Path) -> None:
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
