"""Well-known models as cards: their configs and the headers of their files, without a weight.

A card is a JSON file of ``model_cards/``, written by us:

- ``id``: the model's name on the Hugging Face hub
- ``config``: the fields of its ``config.json`` that matter here
- ``tensors``: what the headers of its safetensors files say: dtype and shape by name. Names are
  patterns: ``{0..31}`` stands for these numbers, ``{q,k,v}`` for these words
- ``gguf``: in the place of both, for a model that is a GGUF file: its ``file`` name, ``metadata``,
  ``tensors`` (their types are ggml's) and the size of its ``vocabulary``
- ``files``: further JSON files, by name. Chat templates are short ones of ours, with the words by
  which reasoning is told
- ``published``: the size of its checkpoint and the source of the figure. ``of`` says what it is the
  size of: ``"tensors"``, ``"files"`` (which have headers too), or ``"rounded"`` files
- ``unsized``: in its place, why there is no such figure
- ``in_format``: the card that it is a quantized variant ``of``, where ``sizing.formats`` has a
  ``name`` for the format and the size is a published one
- ``loaded``: GiB of its weights once they are loaded, by a log of vLLM's on a GPU
- ``parameters``: how many weights it has, once they are unpacked
- ``kv``: bytes per token of its KV cache in two-byte floats, and where that figure is from
- ``cache``: the tokens for which there is room in so many GiB of it, by a log of vLLM's
- ``served``: the tokens for which there is room on a ``device``, by a log of vLLM's
- ``expected``: what is to be found out about it; see ``test_model_cards.py``

Sizes, logs and what has a ``source`` were read there. Of the configs some values are from memory:
what the tests find by them is held against these figures, and no card is a source for a config.
"""

import functools
import itertools
import json
import math
import re
import struct
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf_files
from vllm_bridge.checkpoints.headers import WIDTH, read_header

FOLDER = Path(__file__).parent / "model_cards"

Card = Mapping[str, Any]

_BRACES = re.compile(r"\{([^{}]*)\}")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name: str) -> Card:
    card: Card = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return card


def expand(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for."""
    parts = _BRACES.split(pattern)
    choices = [list(_choices(part)) for part in parts[1::2]]
    for chosen in itertools.product(*choices):
        filled = itertools.chain.from_iterable(zip(parts[::2], (*chosen, ""), strict=True))
        yield "".join(filled)


def _choices(words: str) -> Iterator[str]:
    for word in words.split(","):
        first, dots, last = word.partition("..")
        if dots:
            yield from map(str, range(int(first), int(last) + 1))
        else:
            yield word


def write(card: Card, folder: Path) -> Path:
    """Writes the model, and returns what to load. Its files have their true sizes and headers, and
    nothing where most weights would be, so that they take no room.
    """
    folder.mkdir(parents=True)
    for name, content in card.get("files", {}).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    if gguf := card.get("gguf"):
        return _write_gguf(gguf, folder)
    if "config" in card:
        (folder / "config.json").write_text(json.dumps(card["config"]), encoding="utf-8")
    if "tensors" in card:
        path = folder / "model.safetensors"
        _write_safetensors(card["tensors"], path)
        quantization = card["config"].get("quantization_config", {})
        if quantization.get("quant_method") == "gptq":
            _write_gptq_values(path, quantization["bits"], quantization["group_size"])
    return folder


def _write_safetensors(tensors: Mapping[str, Any], path: Path) -> None:
    header, end = {}, 0
    for pattern, (dtype, shape) in tensors.items():
        size = math.prod(shape) * WIDTH[dtype] // 8
        for name in expand(pattern):
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": (end, end + size),
            }
            end += size
    data = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)


@functools.cache
def _usual_order(inputs: int, group: int) -> bytes:
    return array("i", (index // group for index in range(inputs))).tobytes()


def _write_gptq_values(path: Path, bits: int, group: int) -> None:
    """What GPTQ has where its weights are symmetric and their columns in the usual order, as far as
    it is looked at before a start."""
    tensors = read_header(str(path))
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            file.seek(tensor.start)
            if name.endswith(".g_idx"):
                file.write(_usual_order(*tensor.shape, group))
            elif name == "model.layers.0.self_attn.q_proj.qzeros":
                middle = (1 << (bits - 1)) - 1  # the format stores one less
                each = sum(middle << shift for shift in range(0, 8, bits))
                file.write(bytes([each]) * tensor.size)


def _write_gguf(gguf: Mapping[str, Any], folder: Path) -> Path:
    count = gguf["vocabulary"]
    tensors = {
        name: gguf_files.Info(tuple(shape), type)
        for pattern, (type, shape) in gguf["tensors"].items()
        for name in expand(pattern)
    }
    metadata = gguf["metadata"] | {
        "tokenizer.ggml.tokens": [f"token{number}" for number in range(count)],
        "tokenizer.ggml.scores": [0.0] * count,
        "tokenizer.ggml.token_type": [1] * count,
    }
    return gguf_files.write(folder / gguf["file"], metadata, tensors)
