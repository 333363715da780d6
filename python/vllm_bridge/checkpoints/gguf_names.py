"""What the tensors of a GGUF file are called on Hugging Face, and which of them a model has.

The names of llama.cpp's converter are those of gguf-py's map, with which a test compares them. The
map has all spellings of all models; here each architecture has its own, with the shapes that its
weights have, so that a file can be looked at without anything else being imported.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from vllm_bridge.checkpoints import gguf_config
from vllm_bridge.checkpoints.gguf import File
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.errors import BridgeError


class Part(NamedTuple):
    """A weight, of each layer or of the whole model.

    Args:
        name: on Hugging Face; within a layer, if it is a layer's
        shape: of its weight, in the terms of ``_sizes``
        bias: whether it always has one
    """

    name: str
    shape: str
    bias: bool = False


_EMBEDDING: Final = {"token_embd": Part("model.embed_tokens", "vocabulary hidden")}
_HEAD: Final = {"output": Part("lm_head", "vocabulary hidden")}
_NORM: Final = {"output_norm": Part("model.norm", "hidden")}

_ATTENTION: Final = {
    "attn_norm": Part("input_layernorm", "hidden"),
    "attn_q": Part("self_attn.q_proj", "queries hidden"),
    "attn_k": Part("self_attn.k_proj", "keys hidden"),
    "attn_v": Part("self_attn.v_proj", "keys hidden"),
    "attn_output": Part("self_attn.o_proj", "hidden queries"),
}
_BIASED_ATTENTION: Final = _ATTENTION | {
    "attn_q": Part("self_attn.q_proj", "queries hidden", bias=True),
    "attn_k": Part("self_attn.k_proj", "keys hidden", bias=True),
    "attn_v": Part("self_attn.v_proj", "keys hidden", bias=True),
}
_HEAD_NORMS: Final = {
    "attn_q_norm": Part("self_attn.q_norm", "head"),
    "attn_k_norm": Part("self_attn.k_norm", "head"),
}
_MLP_NORM: Final = {"ffn_norm": Part("post_attention_layernorm", "hidden")}
_UNGATED_MLP: Final = {
    "ffn_up": Part("mlp.up_proj", "intermediate hidden"),
    "ffn_down": Part("mlp.down_proj", "hidden intermediate"),
}
_MLP: Final = _UNGATED_MLP | {"ffn_gate": Part("mlp.gate_proj", "intermediate hidden")}
_MIXTRAL_EXPERTS: Final = {
    "ffn_gate_inp": Part("block_sparse_moe.gate", "experts hidden"),
    "ffn_gate_exps": Part("block_sparse_moe.experts.w1", "experts intermediate hidden"),
    "ffn_down_exps": Part("block_sparse_moe.experts.w2", "experts hidden intermediate"),
    "ffn_up_exps": Part("block_sparse_moe.experts.w3", "experts intermediate hidden"),
}
_EXPERTS: Final = {
    "ffn_gate_inp": Part("mlp.gate", "experts hidden"),
    "ffn_gate_exps": Part("mlp.experts.gate_proj", "experts expert hidden"),
    "ffn_down_exps": Part("mlp.experts.down_proj", "experts hidden expert"),
    "ffn_up_exps": Part("mlp.experts.up_proj", "experts expert hidden"),
}
_SHARED_EXPERT: Final = {
    "ffn_gate_inp_shexp": Part("mlp.shared_expert_gate", "hidden"),
    "ffn_gate_shexp": Part("mlp.shared_expert.gate_proj", "shared hidden"),
    "ffn_down_shexp": Part("mlp.shared_expert.down_proj", "hidden shared"),
    "ffn_up_shexp": Part("mlp.shared_expert.up_proj", "shared hidden"),
}
_FOUR_NORMS: Final = {
    "post_attention_norm": Part("post_attention_layernorm", "hidden"),
    "ffn_norm": Part("pre_feedforward_layernorm", "hidden"),
    "post_ffw_norm": Part("post_feedforward_layernorm", "hidden"),
}

# The parts of a layer by the file's names of them, for each `model_type` that a config has.
LAYERS: Final[Mapping[str, Mapping[str, Part]]] = {
    "llama": _ATTENTION | _MLP_NORM | _MLP,
    "mixtral": _ATTENTION | _MLP_NORM | _MIXTRAL_EXPERTS,
    "qwen2": _BIASED_ATTENTION | _MLP_NORM | _MLP,
    "qwen2_moe": _BIASED_ATTENTION | _MLP_NORM | _EXPERTS | _SHARED_EXPERT,
    "qwen3": _ATTENTION | _HEAD_NORMS | _MLP_NORM | _MLP,
    "qwen3_moe": _ATTENTION | _HEAD_NORMS | _MLP_NORM | _EXPERTS,
    "gemma": _ATTENTION | _MLP_NORM | _MLP,
    "gemma2": _ATTENTION | _FOUR_NORMS | _MLP,
    "gemma3_text": _ATTENTION | _HEAD_NORMS | _FOUR_NORMS | _MLP,
    "phi": {
        "attn_norm": Part("input_layernorm", "hidden", bias=True),
        "attn_q": Part("self_attn.q_proj", "queries hidden", bias=True),
        "attn_k": Part("self_attn.k_proj", "keys hidden", bias=True),
        "attn_v": Part("self_attn.v_proj", "keys hidden", bias=True),
        "attn_output": Part("self_attn.dense", "hidden queries", bias=True),
        "ffn_up": Part("mlp.fc1", "intermediate hidden", bias=True),
        "ffn_down": Part("mlp.fc2", "hidden intermediate", bias=True),
    },
    "phi3": {
        "attn_norm": Part("input_layernorm", "hidden"),
        "attn_qkv": Part("self_attn.qkv_proj", "queries+keys+keys hidden"),
        "attn_output": Part("self_attn.o_proj", "hidden queries"),
        "ffn_norm": Part("post_attention_layernorm", "hidden"),
        "ffn_up": Part("mlp.gate_up_proj", "intermediate+intermediate hidden"),
        "ffn_down": Part("mlp.down_proj", "hidden intermediate"),
    },
    "stablelm": _ATTENTION
    | {"attn_norm": Part("input_layernorm", "hidden", bias=True)}
    | {"ffn_norm": Part("post_attention_layernorm", "hidden", bias=True)}
    | _MLP,
    "nemotron": _ATTENTION
    | {"attn_norm": Part("input_layernorm", "hidden", bias=True)}
    | {"ffn_norm": Part("post_attention_layernorm", "hidden", bias=True)}
    | _UNGATED_MLP,
    "starcoder2": _BIASED_ATTENTION
    | {"attn_norm": Part("input_layernorm", "hidden", bias=True)}
    | {"ffn_norm": Part("post_attention_layernorm", "hidden", bias=True)}
    | {"attn_output": Part("self_attn.o_proj", "hidden queries", bias=True)}
    | {"ffn_up": Part("mlp.c_fc", "intermediate hidden", bias=True)}
    | {"ffn_down": Part("mlp.c_proj", "hidden intermediate", bias=True)},
}

# What lies around the layers, where that is not as usual.
_AROUND: Final[Mapping[str, Mapping[str, Part]]] = {
    "phi": {
        "output_norm": Part("model.final_layernorm", "hidden", bias=True),
        "output": Part("lm_head", "vocabulary hidden", bias=True),
    },
    "stablelm": {"output_norm": Part("model.norm", "hidden", bias=True)},
    "nemotron": {"output_norm": Part("model.norm", "hidden", bias=True)},
    "starcoder2": {"output_norm": Part("model.norm", "hidden", bias=True)},
}

# Computed by llama.cpp's converter, for what a config says of positions.
COMPUTED: Final = re.compile(
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd(\.weight)?"
)

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([a-z_]+)\.(weight|bias)")
_OTHER = re.compile(r"([a-z_]+)\.(weight|bias)")


def names(file: File, config: Mapping[str, Any]) -> dict[str, str]:
    """The names on Hugging Face of a file's tensors, by the file's. Experts that are stacked have
    one: ``model.layers.0.mlp.experts.gate_proj.weight``.

    Args:
        config: what ``gguf_config.config`` makes of the file

    Raises:
        BridgeError: ``unsupported_model`` for a tensor that models of this kind do not have
    """
    model_type = config["model_type"]
    around = _around(model_type)
    are_biased = any(config.get(name) for name in ("attention_bias", "mlp_bias", "use_qkv_bias"))
    found = {}
    for key in file.tensors:
        if COMPUTED.fullmatch(key):
            continue
        if match := _LAYER.fullmatch(key):
            number, stem, suffix = match.groups()
            part = (
                LAYERS[model_type].get(stem) if int(number) < config["num_hidden_layers"] else None
            )
            prefix = f"model.layers.{number}."
        elif match := _OTHER.fullmatch(key):
            stem, suffix = match.groups()
            part, prefix = around.get(stem), ""
        else:
            part = None
        if part is None or (suffix == "bias" and not (part.bias or are_biased)):
            raise gguf_config.unsupported(
                file,
                f"`{file.path}` holds a tensor `{key}`, which models of the type {model_type} do "
                "not have here.",
                tensor=key,
            )
        found[key] = f"{prefix}{part.name}.{suffix}"
    return found


def check(path: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Looks whether the tensors are those of the config.

    Args:
        path: of the file
        tensors: by their names on Hugging Face

    Raises:
        BridgeError: ``invalid_checkpoint`` where one is missing or of another shape
    """
    sizes = _sizes(config)
    for name, shape, is_needed in _expected(config):
        tensor = tensors.get(name)
        if tensor is None and is_needed:
            raise BridgeError(
                "invalid_checkpoint",
                f"`{path}` lacks `{name}`, which a {config['model_type']} model of "
                f"{config['num_hidden_layers']} layers has.",
                {"file": path, "tensor": name},
                remedy="Download it again.",
            )
        expected = tuple(sum(sizes[term] for term in size.split("+")) for size in shape.split())
        if tensor is not None and tensor.shape != expected:
            raise BridgeError(
                "invalid_checkpoint",
                f"`{name}` in `{path}` has the shape {list(tensor.shape)}, and by what the file "
                f"says of the model it should have {list(expected)}.",
                {"file": path, "tensor": name},
                remedy="Download it again.",
            )


def _around(model_type: str) -> Mapping[str, Part]:
    return {**_EMBEDDING, **_NORM, **_HEAD, **_AROUND.get(model_type, {})}


def _expected(config: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Each tensor that a model can have: its name, its shape, and whether it must be there."""
    model_type = config["model_type"]
    for stem, part in _around(model_type).items():
        tied = stem == "output" and config["tie_word_embeddings"]
        yield from _tensors(part.name, part, not tied)
    for number in range(config["num_hidden_layers"]):
        for part in LAYERS[model_type].values():
            yield from _tensors(f"model.layers.{number}.{part.name}", part, True)


def _tensors(name: str, part: Part, is_needed: bool) -> Iterator[tuple[str, str, bool]]:
    rows = part.shape.split()[0]
    yield f"{name}.weight", part.shape, is_needed
    yield f"{name}.bias", rows, is_needed and part.bias


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    head = config["head_dim"]
    return {
        "vocabulary": config["vocab_size"],
        "hidden": config["hidden_size"],
        "head": head,
        "queries": config["num_attention_heads"] * head,
        "keys": config["num_key_value_heads"] * head,
        "intermediate": config["intermediate_size"],
        "experts": config.get("num_local_experts", config.get("num_experts", 0)),
        "expert": config.get("moe_intermediate_size", 0),
        "shared": config.get("shared_expert_intermediate_size", 0),
    }
