"""Brings the tensors of GGUF files into vLLM's models, under the names of Hugging Face.

They are mapped into memory, so that each is copied once, to its place in the model. What
llama.cpp's converter has changed is changed back: rows that it moved are moved while they are
packed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_bridge.checkpoints import gguf, gguf_config, gguf_names
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.quantization.gguf import joined, kernels
from vllm_bridge.quantization.gguf.layers import PLAIN, has_kernel, packed_names, read

# The architectures whose queries and keys llama.cpp's converter permutes, because it rotates
# neighbours where Hugging Face rotates halves (`LlamaModel.permute`).
_PERMUTED = ("llama",)

# Those whose norms it writes with the one that the model adds to them.
_NORMS_AND_ONE = ("gemma", "gemma2", "gemma3", "nemotron")


@register_model_loader("gguf")
class GGUFLoader(BaseModelLoader):  # type: ignore[misc]
    def download_model(self, model_config: Any) -> None:
        """There is nothing to download: the model is a folder by now."""

    def load_model(self, vllm_config: Any, *args: Any, **named: Any) -> torch.nn.Module:
        model: torch.nn.Module = super().load_model(vllm_config, *args, **named)
        if vllm_config.lora_config is None:  # adapters come between the products
            joined.join(model)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        packed = packed_names(model)
        # Norms are of 32 bits in the file; vLLM warns of each that it has to convert.
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        model.load_weights(
            (name, values if name in packed else values.to(dtypes.get(name, values.dtype)))
            for name, values in tensors(read(model_config.model), packed, model_config.dtype)
        )


def tensors(
    file: gguf.File, packed: set[str], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model by their names on Hugging Face, each expert's by itself.

    Args:
        packed: the names of those that are wanted as bytes, [rows, bytes of a row], where their
            type has a kernel
        dtype: of those that are dequantized here
    """
    config = gguf_config.config(file)
    data = {
        part: torch.from_file(part, shared=False, size=size, dtype=torch.uint8)
        for part, size in _sizes(file).items()
    }
    for key, name in gguf_names.names(file, config).items():
        tensor = file.tensors[key]
        values = _rows(data[tensor.file], tensor)
        if not (tensor.dtype in PLAIN or (name in packed and has_kernel(tensor.dtype))):
            values = _dequantized(values, tensor.dtype, dtype)
        values = _as_trained(file, config, key, values)
        if ".experts." in name and values.dim() > 2:
            before, _, after = name.partition(".experts.")
            for expert, part in enumerate(values):
                yield f"{before}.experts.{expert}.{after}", part
        else:
            yield name, values


def _sizes(file: gguf.File) -> dict[str, int]:
    """How much of each file is looked at."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        end = tensor.start + tensor.size
        sizes[tensor.file] = max(end, sizes.get(tensor.file, 0))
    return sizes


def _rows(data: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """Plain numbers in the tensor's shape, or the bytes of its rows."""
    values = data[tensor.start : tensor.start + tensor.size]
    if tensor.dtype in PLAIN:
        return values.view(PLAIN[tensor.dtype]).view(tensor.shape)
    return values.view(*tensor.shape[:-1], -1)


def _dequantized(rows: torch.Tensor, type: str, dtype: torch.dtype) -> torch.Tensor:
    number = gguf.TYPES[type].number
    if has_kernel(type):
        return kernels.dequantize(rows, number, dtype)
    import gguf as gguf_py

    values = gguf_py.quants.dequantize(rows.numpy(), gguf_py.GGMLQuantizationType(number))
    return torch.from_numpy(values).to(dtype)


def _as_trained(
    file: gguf.File, config: Mapping[str, Any], key: str, values: torch.Tensor
) -> torch.Tensor:
    """A tensor without what the converter has done to it."""
    architecture = file.metadata["general.architecture"]
    if architecture in _PERMUTED:
        for part, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
            if f".{part}." in key:
                return _halves(values, config[heads])
    if architecture in _NORMS_AND_ONE and key.endswith("norm.weight"):
        return values - 1
    if key.endswith("ffn_gate_inp_shexp.weight"):
        return values.view(1, -1)
    return values


def _halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head in the order of Hugging Face: first those that llama.cpp has at even
    places."""
    pairs = rows.view(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
