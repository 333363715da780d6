"""The tensors that GGUF files bring into vLLM's models, of every architecture, against the weights
that were written into them as llama.cpp's converter writes them.

From the same files transformers makes the same weights, of all architectures that it reads (which
needs accelerate).
"""

from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import numpy.typing as npt
import pytest
import torch

import gguf_models
from gguf_files import Info, write
from test_gguf_config import CASES, Case, metadata, state, tensors
from vllm_bridge.checkpoints import gguf
from vllm_bridge.quantization.gguf import kernels

Array = npt.NDArray[np.float32]

Q8_0 = reference.GGMLQuantizationType.Q8_0


def weights(given: Case) -> dict[str, Array]:
    """Random ones, by their names on Hugging Face; experts are stacked."""
    numbers = np.random.default_rng(len(given.architecture))
    return {
        name: numbers.standard_normal(shape, np.float32) for name, shape in state(given).items()
    }


def converted(given: Case, name: str, values: Array) -> Array:
    """As llama.cpp's converter does it: ``LlamaModel.permute``, and the ones of norms."""
    if given.architecture == "llama":
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{part}." in name:
                count = getattr(given.config, heads)
                rows = values.reshape(count, 2, len(values) // count // 2, *values.shape[1:])
                return rows.swapaxes(1, 2).reshape(values.shape)
    if given.architecture in ("gemma", "gemma2", "gemma3", "nemotron"):
        return values + 1 if name.endswith("norm.weight") else values
    return values


def written(given: Case, path: Path, type: Any = None) -> gguf.File:
    plain = weights(given)
    data: dict[str, Any] = {}
    infos: dict[str, Info] = {}
    for key, name in tensors(given).items():
        values = converted(given, name, plain[name])
        is_packed = type is not None and values.ndim > 1
        data[key] = quantized(values, type) if is_packed else values
        infos[key] = Info(values.shape, type.name if is_packed else "F32")
    write(path, metadata(given), infos)
    file = gguf.read(str(path))
    with path.open("r+b") as opened:
        for key, values in data.items():
            opened.seek(file.tensors[key].start)
            opened.write(values.tobytes())
    return file


def quantized(values: Array, type: Any = Q8_0) -> npt.NDArray[np.uint8]:
    return np.asarray(reference.quants.quantize(values, type))


def each(name: str, values: Any) -> dict[str, torch.Tensor]:
    """One tensor, or those of experts that are stacked, as checkpoints have them."""
    if ".experts." not in name:
        return {name: torch.from_numpy(values)}
    before, _, after = name.partition(".experts.")
    return {f"{before}.experts.{n}.{after}": torch.from_numpy(v) for n, v in enumerate(values)}


@pytest.mark.parametrize("name", CASES)
def test_plain_tensors_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    from vllm_bridge.quantization.gguf import loader

    given = CASES[name]
    file = written(given, tmp_path / "m.gguf")
    found = dict(loader.tensors(file, set(), torch.bfloat16))
    expected: dict[str, torch.Tensor] = {}
    for key, values in weights(given).items():
        if key.endswith("shared_expert_gate.weight"):  # as the model has it, not the file
            values = values[None]
        expected |= each(key, values)
    assert found.keys() == expected.keys()
    for key, values in found.items():
        # What has one added and taken away again has been rounded.
        close = 1e-6 if key.endswith("norm.weight") else 0
        torch.testing.assert_close(values, expected[key], rtol=close, atol=close, msg=key)


@pytest.mark.parametrize("name", ["llama", "biased", "mixtral", "qwen2moe", "gemma3", "phi3"])
def test_packed_rows_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    from vllm_bridge.quantization.gguf import loader

    given = CASES[name]
    file = written(given, tmp_path / "m.gguf", Q8_0)
    matrices = {key: values for key, values in weights(given).items() if values.ndim > 1}
    packed = dict(loader.tensors(file, set(matrices), torch.bfloat16))
    plain = dict(loader.tensors(file, set(), torch.bfloat16))
    for key, values in matrices.items():
        # Rows are quantized each by itself, so that the order of them makes no difference.
        for one, rows in each(key, quantized(values)).items():
            assert torch.equal(packed[one], rows), one
            numbers = kernels.dequantize(rows, Q8_0, torch.bfloat16)
            assert torch.equal(plain[one], numbers), one


def test_types_without_a_kernel_are_dequantized_while_they_are_read(tmp_path: Path) -> None:
    from vllm_bridge.quantization.gguf import loader

    given, type = CASES["llama"], reference.GGMLQuantizationType.MXFP4
    file = written(given, tmp_path / "m.gguf", type)
    matrices = {key: values for key, values in weights(given).items() if values.ndim > 1}
    found = dict(loader.tensors(file, set(matrices), torch.bfloat16))
    for key, values in matrices.items():
        expected = reference.quants.dequantize(quantized(values, type), type)
        assert torch.equal(found[key], torch.from_numpy(expected).bfloat16()), key


def test_a_file_in_parts_is_one(tmp_path: Path) -> None:
    from vllm_bridge.quantization.gguf import loader

    folder = tmp_path / "parts"
    whole = gguf_models.write(gguf_models.demo(), "Q8_0", tmp_path)
    first = gguf_models.write(gguf_models.demo(), "Q8_0", folder, parts=3)
    assert len(list(folder.iterdir())) == 3
    for path in (first, whole):
        found = dict(loader.tensors(gguf.read(str(path)), set(), torch.float32))
        expected = gguf_models.unpack(whole)
        assert found.keys() == expected.keys()
        assert all(torch.equal(values, expected[name]) for name, values in found.items())
