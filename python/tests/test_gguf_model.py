"""What is known of a GGUF file as a model: from its path or its folder to the plan of an engine."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf as reference
import numpy
import pytest

import gguf_files as raw
import gguf_models
from conftest import NEEDS_LIBGGUF, ROOT
from gguf_files import Info, write, write_llama
from vllm_bridge.checkpoints import fit, gguf
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.engine.finding import Finding
from vllm_bridge.engine.plan import plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import registry

# The matrices of the small Llama.
MATRICES = sum(math.prod(i.shape) for i in raw.llama_tensors().values() if len(i.shape) > 1)
NORMS = sum(i.shape[0] for i in raw.llama_tensors().values() if len(i.shape) == 1)


def refused(model: Path, **options: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        check_model(str(model), options)
    return caught.value


def findings(model: Path, **options: Any) -> list[Finding]:
    return [one for one in plan(str(model), options).findings if one.severity == "error"]


def split(folder: Path, count: int = 3) -> list[Path]:
    """The small Llama in parts."""
    tensors = list(raw.llama_tensors().items())
    step = math.ceil(len(tensors) / count)
    paths = []
    for number in range(count):
        said = {
            "split.no": raw.number(raw.U16, number),
            "split.count": raw.number(raw.U16, count),
            "split.tensors.count": raw.number(raw.I32, len(tensors)),
        }
        path = folder / f"small-{number + 1:05}-of-{count:05}.gguf"
        metadata = said if number else raw.LLAMA | said
        paths.append(write(path, metadata, dict(tensors[number * step :][:step])))
    return paths


def test_a_file_is_a_model(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "small.Q8_0.gguf")
    checkpoint = check_model(str(path), {})
    assert checkpoint.folder == str(tmp_path)
    assert checkpoint.files == (path.name,)
    assert checkpoint.load_format == "gguf"
    assert checkpoint.quant_method == "gguf"
    assert checkpoint.description == "gguf (Q8_0)"
    assert checkpoint.config["model_type"] == "llama"
    tensor = checkpoint.tensors["model.layers.1.self_attn.k_proj.weight"]
    assert (tensor.dtype, tensor.shape) == ("Q8_0", (raw.KEYS, raw.HIDDEN))
    assert tensor.file == str(path)
    assert len(checkpoint.tensors) == len(raw.llama_tensors())
    assert fit.loaded_bytes(checkpoint, {}) == MATRICES * 34 // 32 + 2 * NORMS
    assert fit.loaded_bytes(checkpoint, {"dtype": "float32"}) == MATRICES * 34 // 32 + 4 * NORMS
    assert not findings(path)
    assert plan(str(path), {}).options == {"load_format": "gguf"}
    assert plan(str(path), {}).method == "gguf"


@NEEDS_LIBGGUF
@pytest.mark.parametrize("name", ["demo", "mixture", "qwen2"])
def test_a_file_of_a_model_says_what_its_config_does(tmp_path: Path, name: str) -> None:
    model = getattr(gguf_models, name)()
    path = gguf_models.write(model, "Q4_K_M", tmp_path, parts=3)
    checkpoint = check_model(str(path), {})
    assert not findings(path)
    assert len(checkpoint.files) == 3
    said = model.config | {"quantization_config": checkpoint.quantization}
    # what it has from elsewhere, or what its model has anyway
    own = {key: value for key, value in checkpoint.config.items() if key in said}
    assert own == {key: said[key] for key in own}
    assert {"rope_parameters", "num_key_value_heads", "vocab_size", "rms_norm_eps"} <= set(own)
    # experts are stacked
    stacked = {re.sub(r"\.experts\.\d+", ".experts", name) for name in model.tensors}
    assert set(checkpoint.tensors) == stacked
    types = checkpoint.config["quantization_config"]["types"]
    assert next(iter(types)) == "Q4_K"
    assert sum(types.values()) == pytest.approx(1, abs=1e-3)
    weights = sum(tensor.size for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1)
    assert fit.loaded_bytes(checkpoint, {}) == pytest.approx(weights, rel=0.02)


def test_a_folder_with_a_file_is_a_model(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "small.gguf")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "mmproj-small.gguf").touch()
    (tmp_path / "imatrix.gguf").touch()
    assert check_model(str(tmp_path), {}) == check_model(str(path), {})


def test_a_folder_with_other_weights_is_the_model_that_it_was(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "small.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").touch()
    assert check_model(str(tmp_path), {}).quantization is None
    asked = check_model(str(tmp_path), {"load_format": "gguf"})
    assert asked == check_model(str(path), {})


def test_several_models_in_a_folder_are_told(tmp_path: Path) -> None:
    for name in ("small.Q8_0.gguf", "small.Q4_0.gguf", "mmproj.gguf"):
        (tmp_path / name).touch()
    split(tmp_path)
    error = refused(tmp_path)
    assert error.reason == "not_a_model"
    assert error.details["files"] == [
        "small-00001-of-00003.gguf",
        "small.Q4_0.gguf",
        "small.Q8_0.gguf",
    ]
    assert f"{tmp_path}/small-00001-of-00003.gguf" in error.message


def test_a_file_in_parts_is_a_model(tmp_path: Path) -> None:
    paths = split(tmp_path)
    whole = check_model(str(tmp_path), {})
    assert whole.files == tuple(path.name for path in paths)
    assert {Path(tensor.file).name for tensor in whole.tensors.values()} == set(whole.files)
    for path in paths:
        assert check_model(str(path), {}) == whole
    assert not findings(tmp_path)
    paths[1].unlink()
    for model in (tmp_path, paths[0], paths[2]):
        (finding,) = findings(model)
        assert finding.reason == "invalid_checkpoint"
        assert paths[1].name in finding.message


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"general__type": "mmproj"}, "is a projector (mmproj)"),
        ({"general__architecture": "clip"}, "is a projector (mmproj)"),
        ({"general__type": "adapter"}, "is a LoRA adapter"),
        ({"general__type": "imatrix", "general__architecture": None}, "is an importance matrix"),
    ],
)
def test_files_that_are_no_models_are_told(
    tmp_path: Path, said: dict[str, Any], words: str
) -> None:
    error = refused(write_llama(tmp_path / "model.gguf", **said))
    assert error.reason == "not_a_model"
    assert words in error.message


def test_a_projector_alone_in_a_folder_is_told(tmp_path: Path) -> None:
    write_llama(tmp_path / "mmproj-model.gguf", general__type="mmproj")
    assert "is a projector" in refused(tmp_path).message


def test_a_file_that_is_not_there_is_told_with_one_that_is(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "small.Q8_0.gguf")
    error = refused(tmp_path / "small.Q8_1.gguf")
    assert error.reason == "model_not_found"
    assert f"Did you mean `{path}`?" in error.message
    # It is not looked for on the hub
    assert "There is no file" in refused(Path("small.Q8_0.gguf")).message


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    link = tmp_path / "small.gguf"
    link.symlink_to(tmp_path / "gone.gguf")
    error = refused(link)
    assert error.reason == "model_not_found"
    assert f"is a link to `{tmp_path / 'gone.gguf'}`, which is not there" in error.message


def test_a_file_by_another_name_is_told(tmp_path: Path) -> None:
    error = refused(write_llama(tmp_path / "small.bin"))
    assert error.reason == "not_a_model"
    assert "Give it one that ends with `.gguf`" in error.message


def test_what_lies_beside_a_model_is_told_by_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "small-imatrix-GGUF"
    folder.mkdir()
    path = write_llama(folder / "small.gguf")
    write_llama(folder / "mmproj.gguf", general__type="mmproj")
    assert check_model(str(folder), {}).files == (path.name,)


def test_another_load_format_is_told(tmp_path: Path) -> None:
    error = refused(write_llama(tmp_path / "small.gguf"), load_format="safetensors")
    assert error.reason == "invalid_option"
    assert error.details["option"] == "load_format"


def test_a_file_without_an_architecture_of_ours_is_a_finding(tmp_path: Path) -> None:
    (finding,) = findings(write_llama(tmp_path / "m.gguf", general__architecture="mamba"))
    assert finding.reason == "unsupported_model"


def test_what_is_wrong_with_a_file_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    whole = write_llama(path).read_bytes()
    wrong = {
        "cannot be read as GGUF": whole[:-1],
        "not with `GGUF`": b"nonsense" * 8,
        "lacks `model.layers.1.mlp.up_proj.weight`": raw.header(
            raw.LLAMA, {k: v for k, v in raw.llama_tensors().items() if k != "blk.1.ffn_up.weight"}
        )
        + bytes(len(whole)),
        "`lm_head.weight` in": raw.header(
            raw.LLAMA, raw.llama_tensors() | {"output.weight": Info((7, raw.HIDDEN), "F16")}
        )
        + bytes(len(whole)),
    }
    for words, data in wrong.items():
        path.write_bytes(data)
        (finding,) = findings(path)
        assert finding.reason == "invalid_checkpoint"
        assert words in finding.message


def test_types_without_weights_are_a_finding(tmp_path: Path) -> None:
    for name in ("Q8_1", "I8"):
        tensors = raw.llama_tensors() | {
            "blk.0.attn_q.weight": Info((raw.HIDDEN, raw.HIDDEN), name)
        }
        (finding,) = findings(write(tmp_path / "m.gguf", raw.LLAMA, tensors))
        assert finding.reason == "unsupported_quantization"
        assert finding.details["type"] == name
        assert "model.layers.0.self_attn.q_proj.weight" in finding.message


def test_the_types_that_can_be_read_are_those_of_the_kernels_and_of_gguf_py() -> None:
    from vllm_bridge.quantization.gguf import types

    kernels = {kind.name for kind in types.TYPES.values()} - {"F32", "F16", "BF16"}
    assert kernels == gguf.KEPT
    for name in gguf.READ - gguf.KEPT:
        kind = gguf.TYPES[name]
        row = b"\x01" * kind.size
        values = reference.dequantize(
            numpy.frombuffer(row, "u1"), reference.GGMLQuantizationType(kind.number)
        )
        assert values.size == kind.block


@pytest.mark.parametrize("name", sorted(gguf.READ))
def test_the_size_in_memory_is_that_of_the_file_where_there_is_a_kernel(
    tmp_path: Path, name: str
) -> None:
    kind = gguf.TYPES[name]
    hidden, rows = 512, 256
    metadata = raw.LLAMA | {
        "llama.embedding_length": hidden,
        "llama.block_count": 1,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count_kv": 4,
        "llama.rope.dimension_count": 128,
        "tokenizer.ggml.tokens": ["a", "b", "c"],
    }
    shapes = {
        "token_embd": (rows, hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden, hidden),
        "blk.0.attn_v": (hidden, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (256, hidden),
        "blk.0.ffn_up": (256, hidden),
        "blk.0.ffn_down": (hidden, 256),
    }
    tensors = {f"{key}.weight": Info(shape, name) for key, shape in shapes.items()}
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    tensors |= {f"{key}.weight": Info((hidden,)) for key in norms}
    path = write(tmp_path / "m.gguf", metadata, tensors)
    checkpoint = check_model(str(path), {})
    weights = sum(math.prod(shape) for shape in shapes.values())
    each = kind.size / kind.block if name in gguf.KEPT else 2
    assert fit.loaded_bytes(checkpoint, {}) == weights * each + 2 * 3 * hidden
    per_weight = registry.of("gguf").bytes_per_weight(checkpoint.quantization or {})
    assert per_weight is not None
    assert per_weight.disk == pytest.approx(kind.size / kind.block)
    assert per_weight.memory == pytest.approx(each)
    assert not findings(path)


def test_a_model_that_does_not_fit_is_a_finding(tmp_path: Path) -> None:
    checkpoint = check_model(str(write_llama(tmp_path / "small.gguf")), {})
    needed = fit.loaded_bytes(checkpoint, {})
    fit.check_memory(checkpoint, {}, needed, "memory")
    with pytest.raises(BridgeError) as caught:
        fit.check_memory(checkpoint, {}, needed - 1, "memory")
    assert caught.value.reason == "out_of_memory"


def test_a_file_is_looked_at_without_torch_vllm_and_gguf_py(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "small.gguf")
    script = (
        "import sys\n"
        "from vllm_bridge.engine.plan import plan\n"
        f"assert not plan({str(path)!r}, {{}}).findings\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT / "python")},
    )
    assert done.stdout.strip() == "[]"
