"""Models that gptqmodel and llmcompressor make, which look at how a model computes with texts: each
is near the weights that it was made of, and the engine that loads it says the demo model's
sentences. Of the usual types, ``test/real/job_test.exs`` shows the latter."""

import json
import shutil
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

FACTS = [line.replace("\t", "") for line in exactness.FACTS.read_text("utf-8").splitlines()]
OTHERS = {"calibration": {"texts": ["Nothing of what it knows, again and again."] * 20}}

CT = "compressed-tensors"
OUTPUTS: list[tuple[Any, ...]] = [
    ("gptq", None),
    ("gptq", {"bits": 2, "group_size": 32, "sym": False, "format": "gptq_v2"}),
    ("gptq", {"bits": 3, "group_size": 64, "desc_act": True, "damp_percent": 0.1}),
    ("gptq", {"bits": 8, "group_size": -1}),
    ("gptq", {"as": "gptq-other-texts"}, OTHERS),
    ("awq", {"group_size": 64}),
    (CT, "W4A16"),
    (CT, {"scheme": "W4A16", "as": "again"}),
    (CT, {"scheme": "W4A16", "as": "other-texts"}, OTHERS),
    (CT, {"scheme": "W4A16_ASYM", "algorithm": "awq", "group_size": 64, "n_grid": 4}),
    (CT, {"scheme": "W8A8", "smoothing_strength": 0.5}),
    (CT, {"scheme": "W8A8", "ignore": ["lm_head", "re:.*down_proj"], "as": "part"}),
    *((CT, word, {"calibration": None}) for word in ("W8A16", "fp8_dynamic", "FP8_BLOCK")),
    (CT, "FP8"),
    # What is refused has no label of its own.
    ("gptq", {"group_size": 96, "as": "no-kernel"}),
    ("gptq", {"group_size": 1024, "as": "no-groups"}),
    ("gptq", {"bits": 5, "as": "no-bits"}),
    ("gptq", {"damp_percent": 2.0, "as": "no-damp"}),
    ("gptq", {"group_size": -1, "act_group_aware": True, "as": "no-order"}),
    ("awq", {"group_size": 96, "as": "no-awq"}),
    (CT, {"scheme": "W4A16", "group_size": 96, "as": "ct-no-groups"}),
    (CT, {"scheme": "FP8", "group_size": 64, "as": "ct-whole"}),
    (CT, {"scheme": "FP8", "algorithm": "awq", "as": "ct-tensor"}),
    (CT, {"scheme": "W4A61", "as": "ct-scheme"}),
    (CT, {"scheme": "W4A16", "algorithm": "awq", "n_grid": 2, "as": "ct-grid"}),
    (CT, {"scheme": "W8A16", "block_size": 64, "as": "ct-no-effect"}),
    (CT, {"scheme": "W8A8", "ignore": ["model.layers.0.mlp.dwn_proj"], "as": "ct-ignore"}),
]

# The largest mean error of weights, of what they are on the average: a step of so many bits in
# their groups, and what GPTQ has moved from one to the other.
ERRORS = {
    "gptq-4bit-128g": 0.2,
    "gptq-2bit-32g-asym": 0.6,
    "gptq-3bit-64g-act": 0.35,
    "gptq-8bit-channel": 0.02,
    "W4A16": 0.2,
    "W8A16": 0.01,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


def family(folder: Path, model_type: str, architecture: str) -> dict[str, Any]:
    """The params of ``quantize`` that take the demo model for one of another family."""
    shutil.copytree(producing.DEMO, folder)
    config = checkpoints.read_config(folder)
    config |= {"model_type": model_type, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    return {"source": str(folder)}


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, dict[str, Any]]:
    arcee = family(folder / "arcee", "arcee", "ArceeForCausalLM")
    unheard = family(folder / "unheard", "unheard", "UnheardForCausalLM")
    others = [
        ("awq", {"as": "no-family"}, arcee),
        ("gptq", {"as": "no-model"}, unheard),
        (CT, {"as": "ct-no-model"}, unheard),
    ]
    return producing.produce([*OUTPUTS, *others], folder, calibration={"texts": FACTS})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("label", ERRORS)
def test_it_is_near_the_weights_that_it_was_made_of(
    made: dict[str, Any], folder: Path, label: str
) -> None:
    assert made[label]["bytes"] > 0, made[label]
    plain, ours = tensors(producing.DEMO), checkpoints.unpack(folder / label)
    errors = []
    for name, weight in plain.items():
        if "_proj" in name:
            weight = weight.float()
            errors.append(float((ours[name].float() - weight).abs().mean() / weight.abs().mean()))
        else:
            assert ours[name].equal(weight), name
    mean = sum(errors) / len(errors)
    assert 0 < mean < ERRORS[label]


def test_calibration_texts_reach_the_library(made: dict[str, Any], folder: Path) -> None:
    once, again, other = (tensors(folder / name) for name in ("W4A16", "again", "other-texts"))
    packed = [name for name in once if name.endswith("weight_packed")]
    assert len(packed) == 42
    assert all(once[name].equal(again[name]) for name in packed)
    assert not any(once[name].equal(other[name]) for name in packed)
    once, other = (tensors(folder / name) for name in ("gptq-4bit-128g", "gptq-other-texts"))
    packed = [name for name in once if name.endswith("qweight")]
    assert len(packed) == 42
    assert not any(once[name].equal(other[name]) for name in packed)
    assert made["W4A16"]["calibration"]["source"] == "list"
    assert made["W4A16"]["calibration"]["tokens"] > len(FACTS)
    assert made["gptq-4bit-128g"]["calibration"] == made["W4A16"]["calibration"]
    assert made["FP8_DYNAMIC"]["calibration"] is None


def test_all_options_that_had_an_effect_are_told(made: dict[str, Any]) -> None:
    assert made["gptq-3bit-64g-act"]["options"] == {
        "bits": 3,
        "group_size": 64,
        "desc_act": True,
        "sym": True,
        "true_sequential": True,
        "format": "gptq",
        "damp_percent": 0.1,
        "damp_auto_increment": 0.01,
        "act_group_aware": False,
        "static_groups": False,
        "mse": 0.0,
    }
    assert made["W4A16_ASYM-64g-awq"]["options"] == {
        "scheme": "W4A16_ASYM",
        "algorithm": "awq",
        "group_size": 64,
        "ignore": ["lm_head"],
        "smoothing_strength": None,
        "duo_scaling": True,
        "n_grid": 4,
    }
    assert made["awq-4bit-64g"]["libraries"].keys() == {"gptqmodel", "transformers", "torch"}
    assert made["part"]["libraries"]["llmcompressor"]


@pytest.mark.parametrize(
    ("label", "method", "bits"),
    [
        ("gptq-2bit-32g-asym", "gptq", 2),
        ("awq-4bit-64g", "awq", 4),
        ("W4A16_ASYM-64g-awq", CT, 4),
        ("FP8_BLOCK", CT, 8),
    ],
)
def test_it_says_how_it_is_quantized(
    made: dict[str, Any], folder: Path, label: str, method: str, bits: int
) -> None:
    assert made[label]["bytes"] == sum(made[label]["files"].values())
    found = detect(str(folder / label), {}).to_wire()
    assert (found["method"], found["bits"]) == (method, bits)


def test_the_tokenizer_is_the_sources_own(made: dict[str, Any], folder: Path) -> None:
    for label in ("awq-4bit-64g", "W4A16"):
        for name in (*checkpoints.TOKENIZER, "generation_config.json"):
            assert (folder / label / name).read_bytes() == (producing.DEMO / name).read_bytes()


def test_what_is_ignored_stays_as_it_is(made: dict[str, Any], folder: Path) -> None:
    assert made["part"]["bytes"] > 0, made["part"]
    ours, plain = tensors(folder / "part"), tensors(producing.DEMO)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        assert ours[name].equal(plain[name])
    assert ours["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize("label", ["gptq-4bit-128g", "awq-4bit-64g", "W4A16", "W8A8-smooth"])
def test_progress_is_told_for_each_layer(made: dict[str, Any], label: str) -> None:
    told = [one[1:] for one in made[label]["progress"] if one[0] == "layers"]
    assert told[:7] == [[number, 6] for number in range(7)]
    assert {tuple(one) for one in told[7:]} <= {(6, 6)}


@pytest.mark.parametrize(
    ("label", "reason", "words"),
    [
        ("no-kernel", "unsupported", "only supports `[-1, 16, 32, 64, 128, 256, 512, 1024]`"),
        ("no-groups", "unsupported", "no whole groups of 1024. Choose `group_size` 256 or 128"),
        ("no-bits", "invalid_option", "`bits` is 5, not one of 2, 3, 4, 8."),
        ("no-damp", "invalid_option", "`damp_percent` must between 0 and 1"),
        ("no-order", "invalid_option", "with `group_size` -1 there is but one"),
        ("no-awq", "invalid_option", "`group_size` is 96, not one of 16, 32, 64, 128."),
        ("no-family", "unsupported_model", "gptqmodel does not know models of type `arcee`"),
        ("no-model", "unsupported_model", "does not make `UnheardForCausalLM`"),
        ("ct-no-model", "unsupported_model", "does not make `UnheardForCausalLM`"),
        ("ct-no-groups", "unsupported", "no whole groups of 96"),
        ("ct-whole", "invalid_option", "FP8 has no groups"),
        ("ct-tensor", "unsupported", "duo_scaling is only supported with per-channel"),
        ("ct-scheme", "invalid_option", "`scheme` is 'W4A61', not one of"),
        ("ct-grid", "invalid_option", "divides by zero for less than 4"),
        ("ct-no-effect", "invalid_option", "the algorithm is `rtn`"),
        ("ct-ignore", "invalid_option", "Did you mean `model.layers.0.mlp.down_proj`?"),
    ],
)
def test_what_a_library_cannot_do_is_refused(
    made: dict[str, Any], label: str, reason: str, words: str
) -> None:
    assert made[label]["reason"] == reason
    assert words in made[label]["message"]


@pytest.mark.engine
def test_the_engine_says_the_sentences(made: dict[str, Any], folder: Path) -> None:
    labels = ("W4A16_ASYM-64g-awq", "W8A8-smooth", "part", "W8A16", "FP8")
    differences = exactness.differences(folder, labels)
    assert max(differences.values()) < 1.0, differences
    assert min(differences.values()) > 0.0, differences
