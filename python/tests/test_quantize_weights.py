"""Models that bitsandbytes, HQQ and torchao make, which look at nothing but weights: each is what
the library itself makes of the weights, and the engine that loads it says the demo model's
sentences. Of the usual types, ``test/real/job_test.exs`` shows the latter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import exactness
import producing
from vllm_bridge.checkpoints.detect import detect

pytestmark = pytest.mark.slow

OUTPUTS: list[tuple[str, Any]] = [
    *(("bitsandbytes", word) for word in ("nf4", "fp4", "nf4-double", "int8")),
    *(("hqq", word) for word in (None, "8bit")),
    ("hqq", {"nbits": 3, "axis": 0, "as": "three"}),
    ("hqq", {"nbits": 2, "group_size": 16, "as": "two"}),
    ("torchao", "int8"),
    ("torchao", "int8-dynamic"),
    ("hqq", {"nbits": 4, "group_size": 8, "skip_modules": ["mlp"], "as": "attention"}),
    # What is refused has no label of its own.
    ("hqq", {"group_size": 12, "as": "refused-1"}),
    ("hqq", {"group_size": 65536 * 8, "as": "refused-2"}),
    ("torchao", {"quant_type": "Int4WeightOnlyConfig", "as": "refused-3"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, dict[str, Any]]:
    return producing.produce(OUTPUTS, folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("label", "other"),
    [
        ("nf4", "bnb-nf4"),
        ("fp4", "bnb-fp4"),
        ("nf4-double", "bnb-nf4-double"),
        ("bnb-int8", "bnb-int8"),
    ],
)
def test_bitsandbytes_is_what_its_layers_save(
    made: dict[str, Any], folder: Path, label: str, other: str, tmp_path: Path
) -> None:
    assert made[label]["files"]["model.safetensors"] > 0, made[label]
    reference = checkpoints.make(other, tmp_path / "reference")
    assert same(tensors(folder / label), tensors(reference))


def test_hqq_is_what_its_layers_save(made: dict[str, Any], folder: Path) -> None:
    """Those of ``scripts/hqq_models``."""
    stored = tensors(checkpoints.CHECKPOINTS / "hqq")
    ours = tensors(folder / "hqq-4bit-64g")
    assert same({name: ours[name] for name in stored}, stored)
    plain = tensors(producing.DEMO)
    assert ours["model.embed_tokens.weight"].equal(plain["model.embed_tokens.weight"])


def test_what_is_left_out_stays_as_it_is(made: dict[str, Any], folder: Path) -> None:
    ours, plain = tensors(folder / "attention"), tensors(producing.DEMO)
    name = "model.layers.0.mlp.up_proj.weight"
    assert ours[name].equal(plain[name])
    assert "model.layers.0.self_attn.q_proj.W_q" in ours
    assert made["attention"]["options"]["skip_modules"] == ["mlp"]


@pytest.mark.parametrize(
    ("label", "method", "bits"),
    [("nf4", "bitsandbytes", 4), ("hqq-8bit-64g", "hqq", 8), ("torchao-int8", "torchao", 8)],
)
def test_it_says_how_it_is_quantized(
    made: dict[str, Any], folder: Path, label: str, method: str, bits: int
) -> None:
    assert made[label]["bytes"] == sum(made[label]["files"].values())
    found = detect(str(folder / label), {}).to_wire()
    assert (found["method"], found["bits"]) == (method, bits)


def test_progress_is_told_for_each_layer(made: dict[str, Any]) -> None:
    layers = [one[1:] for one in made["torchao-int8"]["progress"] if one[0] == "layers"]
    assert layers == [[number, 42] for number in range(1, 43)]


@pytest.mark.parametrize(
    ("label", "reason", "words"),
    [
        ("refused-1", "invalid_option", "multiples of 8"),
        ("refused-2", "unsupported", "no whole groups of 524288"),
        ("refused-3", "unsupported", "torchao 0.18.0 does not make checkpoints with"),
    ],
)
def test_what_a_library_cannot_do_is_refused(
    made: dict[str, Any], label: str, reason: str, words: str
) -> None:
    assert made[label]["reason"] == reason
    assert words in made[label]["message"]


@pytest.mark.engine
def test_the_engine_says_the_sentences(made: dict[str, Any], folder: Path) -> None:
    labels = ("torchao-int8-dynamic", "attention", "three", "two")
    differences = exactness.differences(folder, labels)
    assert max(differences.values()) < 2.0, differences
    assert min(differences.values()) > 0.0, differences
