"""In which type each tensor of a GGUF file is, by the rules of llama.cpp's quantizer
(``llama_tensor_get_type`` in ``src/llama-quant.cpp``), without an importance matrix.

A file of the type Q4_K_M has most of its matrices in Q4_K and the more sensitive ones in Q6_K:
which depends on a tensor's name, its layer, and how many heads and experts the model has.
"""

import functools
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from vllm_bridge.checkpoints import gguf
from vllm_bridge.sizing import layers, parts
from vllm_bridge.sizing.fields import Fields
from vllm_bridge.sizing.parts import Part

# The types of files that vLLM keeps packed here, with what most of their matrices are in.
FILES: Final[Mapping[str, str]] = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K", "Q5_1": "Q5_1", "Q5_0": "Q5_0", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K",
    "Q4_1": "Q4_1", "Q4_0": "Q4_0", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS", "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K", "Q2_K": "Q2_K",
}  # fmt: skip

_PLAIN: Final = ("F32", "F16", "BF16")

# What a type becomes for rows that are no multiples of its block.
_FALLBACK: Final = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}  # fmt: skip

# llama.cpp's parts by the names that models have for them on Hugging Face.
_ROLES: Final = {
    "untouched": re.compile(rf"{parts.ROUTER_OR_NORM.pattern}|conv1d|position|wpe"),
    "values": parts.VALUES,
    "keys": parts.KEYS,
    "down": re.compile(r"(down_proj|fc2|dense_4h_to_h|\.w2|mlp\.c_proj|fc_out)[._]"),
    "output": re.compile(r"(attn|attention)\.(o_proj|dense|out_proj|c_proj|wo)\."),
    "fused": parts.FUSED,
}

# Of the tokenizer, which is in the file too: what a token takes, with its part of the merges.
_TOKEN_BYTES: Final = 50


class Model(NamedTuple):
    """What of a model the rules depend on.

    Args:
        layers: how many there are
        queries_per_key: heads of queries that share one of keys and values
        experts: in each mixture; 0 where there is none
        is_tied: whether the embeddings are the output layer too
    """

    layers: int
    queries_per_key: int
    experts: int
    is_tied: bool

    @classmethod
    def of(cls, config: Fields, is_tied: bool) -> "Model":
        """
        Args:
            config: of the model of text
            is_tied: see ``Model``
        """
        keys = layers.key_heads(config)
        return cls(
            layers.count(config),
            layers.query_heads(config) // keys if keys else 1,
            layers.experts(config),
            is_tied,
        )


def header_bytes(config: Fields) -> int:
    """What a file has before its tensors, about."""
    return _TOKEN_BYTES * config.number("vocab_size")


def of(file: str, part: Part, model: Model) -> str:
    """The type of a tensor.

    Args:
        file: the type of the file, one of ``FILES``
        part: of a plain model
    """
    if len(part.tensor.shape) < 2 or _role(part.name) == "untouched":
        return "F32"
    usual = FILES[file]
    if file in _PLAIN:
        return usual
    found = _chosen(file, part, model)
    columns = part.tensor.shape[-1]
    if columns % gguf.TYPES[found].block:
        found = _FALLBACK.get(found, "F16")
        if columns % gguf.TYPES[found].block:
            return "F16"
    return found


@functools.lru_cache(maxsize=4096)
def _role(name: str) -> str:
    """Which part of a model a tensor is, where the rules have something to say of it. Each file
    asks again."""
    return next((role for role, pattern in _ROLES.items() if pattern.search(name)), "")


def _chosen(file: str, part: Part, model: Model) -> str:
    """For rows of any length."""
    usual, name, layer = FILES[file], part.name, part.layer or 0
    if part.kind == "embeddings":
        is_output = model.is_tied or part.is_head
        return "Q6_K" if is_output and usual != "Q8_0" else usual
    is_better = _has_more_bits(layer, model.layers)
    match _role(name):
        case "values":
            return _values(file, layer, is_better, model)
        case "keys":
            return "Q8_0" if model.experts == 8 else usual
        case "down":
            return _down(file, layer, is_better, model)
        case "output" if model.experts == 8:
            return "Q5_K" if file in _RAISED_OUTPUTS else usual
        case "output":
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(file, usual)
        case "fused":
            raised = {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}
            return raised.get(file, usual)
    return usual


_RAISED_OUTPUTS: Final = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")


def _values(file: str, layer: int, is_better: bool, model: Model) -> str:
    found, is_shared = FILES[file], model.queries_per_key >= 4
    match file:
        case "Q2_K":
            found = "Q4_K" if is_shared else "Q3_K"
        case "Q3_K_M":
            found = "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_L":
            found = "Q5_K"
        case "IQ4_NL" | "IQ4_XS" if is_shared:
            found = "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if is_better:
            found = "Q6_K"
        case "Q4_K_S" if layer < 4:
            found = "Q5_K"
    # "70B" is what it calls models of 80 layers whose heads share keys.
    if model.layers == 80 and model.queries_per_key > 1 and found in ("Q3_K", "Q4_K"):
        found = "Q5_K"
    return "Q8_0" if model.experts == 8 else found


def _down(file: str, layer: int, is_better: bool, model: Model) -> str:
    is_early = layer < model.layers // 8
    match file:
        case "Q2_K":
            return "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if layer < model.layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if is_better:
            return "Q6_K"
        case "Q4_K_S" | "IQ4_NL" | "IQ4_XS" if is_early:
            return "Q5_K"
    return FILES[file]


def _has_more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
