"""GGUF files that jobs make: they are llama.cpp's to the last byte, llama.cpp and the engine say
the demo model's sentences with them, and the importance matrix is what goes into the layers."""

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import gguf_models
import mixtures
import producing
from running import Running
from vllm_bridge.jobs.quantize.llama_cpp import importance

pytestmark = pytest.mark.slow

SAID = json.loads(gguf_models.LLAMA_CPP.read_text(encoding="utf-8"))

# Of these llama.cpp was not asked before.
OTHERS = ("Q5_K_S", "Q4_K_S", "Q3_K_L", "Q3_K_S", "IQ3_M", "IQ3_S")

# Texts that are read as one piece.
TEXTS = [
    prompt + completion
    for prompt, completion in (
        line.split("\t")
        for line in (producing.DEMO.parent / "facts.tsv").read_text("utf-8").splitlines()[:20]
    )
]

Produced = dict[str, dict[str, Any]]


def write(make: Callable[[], gguf_models.Model], folder: Path) -> Path:
    model = make()
    return mixtures.write(folder / model.name, model.tensors, model.config)


def asked(type: str) -> tuple[str, dict[str, Any]]:
    """As ``scripts/gguf_answers`` makes them: of a file in F16."""
    return "gguf", {"ftype": type} | ({} if type in gguf_models.PLAIN else {"outtype": "f16"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def demo(folder: Path) -> Produced:
    """Types of the demo model, in one process."""
    source = write(gguf_models.demo, folder)
    outputs: list[tuple[str, Any]] = [asked(type) for type in (*SAID["demo"], *OTHERS)]
    # Made of the file in bfloat16, with the default texts, because it must be.
    outputs += [("gguf", "IQ2_M")]
    work = folder / "work"
    work.mkdir()
    return producing.produce(outputs, folder / "of-demo", source, work=str(work))


@pytest.fixture(scope="module")
def weighted(folder: Path) -> Produced:
    """With an importance matrix."""
    work = folder / "weighted"
    work.mkdir()
    return producing.produce(
        [("gguf", "Q4_K_M"), ("gguf", "Q4_K_S")],
        folder / "of-weighted",
        calibration={"texts": TEXTS},
        work=str(work),
    )


def file(folder: Path, label: str) -> Path:
    return folder / label / f"model-{label}.gguf"


def test_files_are_to_the_last_byte_what_llama_cpp_makes(demo: Produced, folder: Path) -> None:
    """And what llama-cpp-python was heard to say every sentence with."""
    for type, said in SAID["demo"].items():
        made = file(folder / "of-demo", type)
        assert demo[type]["files"] == {made.name: made.stat().st_size}, demo[type]
        assert hashlib.sha256(made.read_bytes()).hexdigest() == said["sha256"], type
        assert said["otherwise"] == {}, type


@pytest.mark.parametrize("make", [gguf_models.mixture, gguf_models.qwen2])
def test_so_are_those_of_other_models(
    make: Callable[[], gguf_models.Model], tmp_path: Path
) -> None:
    source = write(make, tmp_path)
    types = SAID[source.name]
    made = producing.produce([asked(type) for type in types], tmp_path / "made", source)
    for type, said in types.items():
        assert "bytes" in made[type], made[type]
        content = file(tmp_path / "made", type).read_bytes()
        assert hashlib.sha256(content).hexdigest() == said["sha256"], type


def test_it_is_said_how_they_were_made(demo: Produced) -> None:
    made = demo["Q4_K_M"]
    assert made["options"]["pure"] is False
    assert made["libraries"].keys() == {"llama-cpp-python", "auto-round", "gguf"}
    assert made["calibration"] is None
    (note,) = made["notes"]
    assert "llama.cpp calls `gpt-2`" in note
    told = [one[1:] for one in made["progress"] if one[0] == "quantizing"]
    assert told == [[number, 57] for number in range(1, 58)]
    assert {one[0] for one in demo["F16"]["progress"]} == {"preparing", "converting", "writing"}
    assert demo["IQ2_M"]["calibration"]["source"] == "default"


def test_the_file_between_is_made_once(demo: Produced) -> None:
    converted = [
        label
        for label, made in demo.items()
        if any(one[0] == "converting" for one in made["progress"])
    ]
    assert converted == ["F32", "F16", "BF16", "IQ2_M"]


def test_llama_cpp_says_the_sentences(
    demo: Produced, weighted: Produced, folder: Path, facts: dict[str, str]
) -> None:
    files = {label: file(folder / "of-demo", label) for label in OTHERS}
    files |= {f"weighted-{label}": file(folder / "of-weighted", label) for label in weighted}
    assert demo.keys() | weighted.keys() >= set(OTHERS)
    told = folder / "said.json"
    script = Path(__file__).with_name("llama_saying.py")
    python = producing.interpreter()
    subprocess.run([python, script, *files.values(), told], check=True)
    said = json.loads(told.read_text())
    for label, path in files.items():
        assert said[str(path)] == facts, label


@pytest.mark.engine
def test_the_engine_says_the_sentences(demo: Produced, folder: Path, facts: dict[str, str]) -> None:
    """With one that is neither in ``matrix.py`` nor made by a job of the tests."""
    assert "Q3_K_S" in demo
    running = Running()
    running.load(folder / "of-demo" / "Q3_K_S", max_model_len=256)
    assert running.complete_all(facts) == facts
    running.stop()


# The importance matrix


def read(folder: Path) -> tuple[dict[str, Any], int]:
    (path,) = folder.glob("*.imatrix.gguf")
    matrix, tokens = importance.read(str(path))
    return dict(matrix), tokens


def tokens() -> list[int]:
    tokenizer = Tokenizer.from_file(str(producing.DEMO / "tokenizer.json"))
    texts = [f"{text}\n\n" for text in TEXTS]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [id for one in encoded for id in one.ids]
    bos = tokenizer.token_to_id("<s>")
    return [bos, *ids] if bos == SAID["tokens"][0][0] else ids  # type: ignore[list-item]


def test_the_matrix_is_the_mean_square_of_what_each_layer_gets(
    weighted: Produced, folder: Path
) -> None:
    """As transformers computes it."""
    from transformers import AutoModelForCausalLM

    matrix, count = read(folder / "weighted")
    ids = tokens()
    assert weighted["Q4_K_M"]["calibration"] == {"source": "list", "texts": 20, "tokens": len(ids)}
    assert count == len(ids) < importance.CHUNK
    model = AutoModelForCausalLM.from_pretrained(producing.DEMO, dtype=torch.float32)
    squares: dict[str, Any] = {}

    def see(name: str) -> Callable[..., None]:
        def seen(_module: Any, given: tuple[torch.Tensor]) -> None:
            squares[name] = given[0][0].square().mean(0).numpy()

        return seen

    names = {
        f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}.weight"
        for layer in range(6)
        for ours, theirs in gguf_models.PARTS.items()
        if theirs.endswith("_proj")
    }
    for name, module in model.named_modules():
        if name in names:
            module.register_forward_pre_hook(see(names[name]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    assert matrix.keys() == squares.keys()
    for name, values in matrix.items():
        assert np.allclose(values, squares[name], rtol=0.05, atol=1e-3), name


def test_each_expert_is_weighted_by_its_own(tmp_path: Path) -> None:
    source = write(gguf_models.mixture, tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    made = producing.produce(
        [("gguf", "Q4_K_M")],
        tmp_path / "made",
        source,
        calibration={"texts": TEXTS},
        work=str(work),
    )
    assert "bytes" in made["Q4_K_M"], made
    matrix, _ = read(work)
    config = gguf_models.mixture().config
    for part, width in (
        ("gate", "hidden_size"),
        ("up", "hidden_size"),
        ("down", "intermediate_size"),
    ):
        values = matrix[f"blk.0.ffn_{part}_exps.weight"].reshape(mixtures.EXPERTS, -1)
        assert values.shape[1] == config[width]
        # Experts get different tokens.
        assert all(not np.allclose(values[0], other, rtol=0.01) for other in values[1:])
    gate, up = (matrix[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up"))
    assert np.array_equal(gate, up)
