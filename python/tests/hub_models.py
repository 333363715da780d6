"""Repositories of small models for the stand-in of the hub."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf_files
from vllm_bridge.hub.look_up import look_up
from vllm_bridge.hub.names import parse
from vllm_bridge.hub.repository import Repository

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def repository(root: Path, name: str, files: Mapping[str, Any], **about: Any) -> Path:
    """Writes a repository.

    Args:
        files: their contents by their paths: bytes, text, or what becomes JSON
        about: what is known of it beside, see ``hub_server``
    """
    folder = root / name
    for path, content in {**files, ".hub.json": about}.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        file.write_bytes(content)
    return folder


def found(name: str = "org/name", **options: Any) -> Repository:
    """What the stand-in tells of a model."""
    parsed = parse(name)
    assert parsed is not None
    return look_up(parsed, options)


def safetensors(names: Mapping[str, int], seed: int = 1) -> bytes:
    """A file of BF16 vectors.

    Args:
        names: of the tensors, with how many elements each has
        seed: for what is in them
    """
    header, end = {}, 0
    for name, count in names.items():
        header[name] = {"dtype": "BF16", "shape": [count], "data_offsets": [end, end + 2 * count]}
        end += 2 * count
    told = json.dumps(header).encode()
    data = bytes((seed * (index + 7) * 31) % 251 for index in range(4096))
    return struct.pack("<Q", len(told)) + told + (data * (end // 4096 + 1))[:end]


def plain(elements: int = 1000) -> dict[str, Any]:
    """The files of a model with one tensor."""
    return {
        "config.json": LLAMA,
        "tokenizer.json": {"model": {}},
        "model.safetensors": safetensors({"model.layers.0.weight": elements}),
    }


def gguf(folder: Path, filler: str = "") -> bytes:
    """A GGUF file of a small Llama.

    Args:
        folder: to write it in on the way
        filler: makes its header longer
    """
    metadata = {**gguf_files.LLAMA, **({"filler": filler} if filler else {})}
    path = gguf_files.write(folder / "scratch.gguf", metadata, gguf_files.llama_tensors())
    return path.read_bytes()
