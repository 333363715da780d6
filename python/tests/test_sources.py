"""Models of other families than the demo model's, quantized: what is made of them is near them and
cuts texts as they do, and what a library cannot make of them is refused before it starts."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import producing
import source_models

pytestmark = pytest.mark.slow

# How far llama.cpp's model in eight bits may be from its source. Unrelated models have 2 and more,
# and a mixture of random experts takes another one now and then.
NEAR = {"mixtral": 0.1, "qwen3-moe": 0.1}
USUAL = 0.02

# Neither have what llama.cpp needs to look back no further than they do.
WINDOWS = ("mistral",)

OTHERS: list[tuple[str, str, Any]] = [
    ("mixtral", "bitsandbytes", {"as": "mixture-nf4"}),
    ("mixtral", "hqq", {"nbits": 8, "as": "mixture-hqq"}),
    ("qwen3-moe", "compressed-tensors", {"group_size": 64, "algorithm": "rtn", "as": "mixture"}),
    ("phi", "awq", {"as": "fused-awq"}),
    ("odd", "gptq", {"group_size": 64, "as": "odd-gptq"}),
    ("odd", "compressed-tensors", {"as": "odd-w4a16"}),
    ("seeing", "hqq", {"as": "seeing-hqq"}),
    ("seeing", "compressed-tensors", {"as": "seeing-w4a16"}),
    ("seeing", "gptq", {"as": "seeing-gptq"}),
]

Produced = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name in source_models.MODELS:
        source_models.make(name, folder)
    source_models.make_seeing(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def made(sources: Path, folder: Path) -> Produced:
    """All in one process."""
    of_all = [
        ("gguf", {"ftype": "Q8_0", "as": name}, {"source": str(sources / name)})
        for name in (*source_models.MODELS, "seeing")
    ]
    others = [(form, options, {"source": str(sources / name)}) for name, form, options in OTHERS]
    return producing.produce([*of_all, *others], folder)


@pytest.fixture(scope="module")
def likeness(made: Produced, sources: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What ``llama_likeness`` tells of each GGUF file."""
    names = [name for name in (*source_models.MODELS, "seeing") if "bytes" in made[name]]
    pairs = [[str(sources / name), str(folder / name / "model-Q8_0.gguf")] for name in names]
    asked, told = folder / "pairs.json", folder / "likeness.json"
    asked.write_text(json.dumps(pairs))
    script = Path(__file__).with_name("llama_likeness.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([producing.interpreter(), script, asked, told], check=True, env=environment)
    return dict(zip(names, json.loads(told.read_text()), strict=True))


@pytest.mark.parametrize("name", [*source_models.MODELS, "seeing"])
def test_a_gguf_file_is_near_its_source_in_llama_cpp(
    name: str, made: Produced, likeness: dict[str, dict[str, Any]]
) -> None:
    assert "bytes" in made[name], made[name]
    like = likeness[name]
    assert like["theirs"] == like["ours"], "it cuts texts into other tokens"
    assert like["context"] > 0.5
    if name in WINDOWS:
        assert "The model looks back 64 tokens" in made[name]["notes"][0]
        assert like["kl"] > 0.5
    else:
        assert 0 <= like["kl"] < NEAR.get(name, USUAL)
        assert not any("looks back" in note for note in made[name]["notes"])


def test_rows_that_blocks_do_not_divide_are_told(made: Produced) -> None:
    (_tokenizer, note) = made["odd"]["notes"]
    assert "rows of 144, 208 numbers" in note
    assert "llama.cpp has them in F16" in note


def test_of_a_model_that_sees_gguf_is_the_part_of_text(made: Produced) -> None:
    (note,) = made["seeing"]["notes"]
    assert "the part of the model that reads and writes text" in note


@pytest.mark.parametrize("label", ["seeing-hqq", "seeing-w4a16", "seeing-gptq"])
def test_other_formats_of_it_are_refused(label: str, made: Produced) -> None:
    assert made[label]["reason"] == "unsupported_model"
    assert "takes pictures or sound, too" in made[label]["message"]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("fused-awq", "queries, keys and values in one matrix"),
        ("mixture-nf4", "experts that are no linear layers"),
        ("odd-gptq", "144 inputs, which are no whole groups of 64. Choose `group_size` 16"),
        ("odd-w4a16", "144 inputs, which are no whole groups of 128"),
    ],
)
def test_what_a_library_cannot_make_is_refused(label: str, words: str, made: Produced) -> None:
    assert made[label]["reason"] == "unsupported"
    assert words in made[label]["message"]


def test_experts_that_stay_as_they_are_are_told(
    made: Produced, sources: Path, folder: Path
) -> None:
    (note,) = made["mixture-hqq"]["notes"]
    assert "are left as they are" in note
    plain, ours = (
        load_file(path / "model.safetensors")
        for path in (sources / "mixtral", folder / "mixture-hqq")
    )
    experts = [name for name in plain if ".experts." in name]
    assert experts
    assert all(ours[name].equal(plain[name]) for name in experts)


def test_experts_are_quantized_by_llm_compressor(made: Produced, folder: Path) -> None:
    assert "bytes" in made["mixture"], made["mixture"]
    names = load_file(folder / "mixture" / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.3.up_proj.weight_packed" in names
