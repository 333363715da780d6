"""What each layer of a model keeps of the tokens that it has seen, from the model's config alone.

The rules are those of vLLM 0.32: which class of layer its models build for which entry of the
config (``model_executor/models/``), how it counts heads (``transformers_utils/
model_arch_config_convertor.py``), and the values that transformers' classes give to entries that a
config leaves out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from vllm_bridge.quantization import scheme
from vllm_bridge.sizing import states
from vllm_bridge.sizing.fields import Fields

Kind = Literal["full", "sliding", "chunked", "mla", "indexer", "cross", "mamba", "shared", "none"]


class Layer(NamedTuple):
    """What one layer keeps, not yet divided among ranks.

    Args:
        kind: ``"full"`` keeps keys and values of every token, ``"sliding"`` those in a window,
            ``"chunked"`` those of the current chunk, ``"mla"`` one latent vector of every token,
            ``"indexer"`` what sparse attention finds tokens by, ``"cross"`` the keys and values of
            the encoder's output, ``"mamba"`` a state of each sequence that does not grow;
            ``"shared"`` uses the keys and values of a layer before it, ``"none"`` keeps nothing
        heads: with keys and values
        key_size: numbers in a key; of ``"mla"`` in the latent vector, of ``"indexer"`` bytes
        value_size: numbers in a value
        window: tokens of a window or chunk
        state: of ``"mamba"``; None where it is not known here
    """

    kind: Kind
    heads: int = 0
    key_size: int = 0
    value_size: int = 0
    window: int | None = None
    state: states.State | None = None

    @property
    def is_known(self) -> bool:
        """Whether the config told what it keeps."""
        if self.kind in ("shared", "none"):
            return True
        return self.state is not None if self.kind == "mamba" else bool(self.key_size)


# What transformers' classes take where a published config has no entry.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cohere2": {"sliding_window": 4096},
    "falcon": {"tie_word_embeddings": True},
    "gemma": {"head_dim": 256, "num_attention_heads": 16, "num_key_value_heads": 16},
    "gemma2": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
    "gemma3_text": {
        "head_dim": 256,
        "hidden_size": 2304,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
    "gemma3n_text": {
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 15,
        "sliding_window": 512,
    },
    "gemma4_text": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 512,
    },
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128},
    "jamba": {"attn_layer_offset": 4, "attn_layer_period": 8},
    "llama": {
        "hidden_size": 4096,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama4_text": {
        "attention_chunk_size": 8192,
        "head_dim": 128,
        "num_attention_heads": 40,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
    },
    "mistral": {
        "hidden_size": 4096,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
    },
    "qwen3_next": {"head_dim": 256, "num_key_value_heads": 2},
}

# One layer of so many attends to every token, where the config has no list of the layers' types.
_EVERY = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gemma3n_text": 5,
    "gemma4_text": 6,
    "gpt_oss": 2,
    "olmo3": 4,
}

_TYPES: Mapping[str, Kind] = {
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "mamba",
    "mamba": "mamba",
    "conv": "mamba",
    "mlp": "none",
    "moe": "none",
}

# Of ``hybrid_override_pattern``.
_LETTERS: Mapping[str, Kind] = {"M": "mamba", "*": "full", "-": "none", "E": "none"}

# Models of one pass over the whole text, in which nothing is kept.
_ENCODERS = {
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie"),
    *("eurobert", "gte", "mpnet", "modernbert", "neobert", "new", "nomic_bert", "roberta"),
    *("xlm-roberta", "clip", "siglip", "siglip2", "vit", "deit", "dinov2", "detr", "yolos"),
}

# MLA by another name of its head size: vLLM keeps whole keys and values of these.
_DECOMPRESSED = {"minicpm3"}

# A model with more layers is none.
_MOST = 10_000

# Whose caches have parts that are told of nowhere else than in vLLM's code for them.
UNKNOWN = {
    *("bailing_hybrid", "deepseek_v4", "deepseek_v41", "dots3_note", "glm5_next", "hy_v4"),
    *("glm5_next_text", "inkling", "kimi_k3", "mimo_v2", "mimo_v2_flash", "minimax_m3"),
    *("qwen4_exp", "qwen4_exp_text", "step3p5", "plamo2"),
}


def text_config(config: Mapping[str, Any]) -> Fields:
    """The config of the part of a model that writes or reads text, with what transformers adds to
    it. It is a part of the whole one of models that see or hear as well."""
    found: Mapping[str, Any] = config
    for name in ("thinker_config", "text_config", "llm_config", "language_config"):
        inner = found.get(name)
        if isinstance(inner, dict):
            found = inner
    # Before transformers had classes for the parts, vision models had the text's entries outside.
    model_type = str(found.get("model_type") or config.get("model_type") or "")
    defaults = DEFAULTS.get(model_type.removesuffix("_text"), DEFAULTS.get(model_type, {}))
    return Fields({**defaults, **found, "model_type": model_type})


def layers(config: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers in their order. One entry of the config may stand for two: of a decoder with
    attention to an encoder, or with attention and a state side by side."""
    return tuple(layer for of_block in blocks(config) for layer in of_block)


def blocks(config: Mapping[str, Any]) -> tuple[tuple[Layer, ...], ...]:
    """``layers`` by the blocks that pipeline ranks divide.

    Raises:
        BridgeError: ``invalid_checkpoint`` for a config that means nothing
    """
    text = text_config(config)
    if is_encoder(config):
        return ()
    with text.understood():
        return _blocks(text)


def _blocks(text: Fields) -> tuple[tuple[Layer, ...], ...]:
    if count(text) > _MOST:
        raise ValueError(f"{count(text)} layers")
    if text.get("is_encoder_decoder"):
        heads = text.number("decoder_attention_heads", "num_heads") or query_heads(text) or 1
        size = text.number("d_kv") or text.number("d_model", "hidden_size") // heads
        both = (Layer("full", heads, size, size), Layer("cross", heads, size, size))
        return (both,) * text.number("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    kinds = list(_kinds(text))
    shared = int(text.get("num_kv_shared_layers") or 0)
    kinds[len(kinds) - shared :] = [("shared",)] * shared
    state, own = states.of(text), _own_entries(text, kinds)
    return tuple(
        _of_block(text.replaced(own.get(index, {})), of_block, index, state)
        for index, of_block in enumerate(kinds)
    )


def _of_block(
    text: Fields, kinds: tuple[Kind, ...], index: int, state: states.State | None
) -> tuple[Layer, ...]:
    with text.understood():
        return tuple(_layer(text, kind, index, state) for kind in kinds)


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether the model reads a text as a whole, so that nothing is kept for later tokens."""
    text = text_config(config)
    if not count(text):
        return True
    return (
        text["model_type"] in _ENCODERS
        or text.get("is_causal") is False
        or text.get("use_bidirectional_attention") in (True, "all")
        or any("Bidirectional" in name for name in scheme.names(config.get("architectures")))
    )


def count(text: Fields) -> int:
    """How many layers there are; 0 where that is not known."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
    if found := text.number(*names, "num_decoder_layers"):
        return found
    with text.understood():
        for name in ("hybrid_override_pattern", "layers_block_type", "layer_types"):
            if listed := text.get(name):
                return len(listed)
    return 0


def _kinds(text: Fields) -> Iterator[tuple[Kind, ...]]:
    """What each block keeps."""
    total, model_type = count(text), text["model_type"]
    full: Kind = "mla" if is_mla(text) else "full"
    if model_type == "falcon_h1":
        return iter([("full", "mamba")] * total)
    if model_type in ("mamba", "mamba2", "falcon_mamba"):
        return iter([("mamba",)] * total)
    if model_type == "longcat_flash":
        return iter([("mla", "mla")] * total)
    if pattern := text.get("hybrid_override_pattern"):
        return ((_LETTERS.get(letter, "none"),) for letter in pattern)
    if found := text.get("block_configs"):
        return (("none",) if _attention(block).get("no_op") else (full,) for block in found)
    if (indices := _full_indices(text, total)) is not None:
        return (((full,) if index in indices else ("mamba",)) for index in range(total))
    if text.get("no_rope_layers") or model_type == "llama4_text":
        return _llama4(text, total)
    types = text.get("layer_types") or text.get("layers_block_type")
    if types is not None:
        return (_of_type(text, type, full) for type in types)
    if (every := _every(text)) is not None:
        other: Kind = "mamba" if states.of(text) else "sliding"
        return (((other,) if (index + 1) % every else (full,)) for index in range(total))
    sliding = _window(text) is not None and full == "full"
    if text.get("index_topk") and full == "mla":
        return iter([("mla", "indexer")] * total)
    return iter([("sliding",) if sliding else (full,)] * total)


def _own_entries(
    text: Fields, kinds: Sequence[tuple[Kind, ...]]
) -> Mapping[int, Mapping[str, Any]]:
    """What layers have in the place of the config's entries, by their numbers."""
    if isinstance(found := text.get("per_layer_config"), dict):
        return {int(index): entries for index, entries in found.items()}
    if not text["model_type"].startswith(("gemma4", "diffusion_gemma")):
        return {}
    whole = {"head_dim": text.get("global_head_dim") or 512}
    if text.get("attention_k_eq_v") and (heads := text.get("num_global_key_value_heads")):
        whole["num_key_value_heads"] = heads
    return {index: whole for index, kind in enumerate(kinds) if kind == ("full",)}


def _of_type(text: Fields, type: str, full: Kind) -> tuple[Kind, ...]:
    if type == "hybrid":  # Zamba2's, whose layers have a state all of them
        return ("full", "mamba")
    kind = _TYPES.get(type, full)
    if kind == "sliding" and _window(text) is None:
        kind = full
    return (kind,)


def _llama4(text: Fields, count: int) -> Iterator[tuple[Kind, ...]]:
    every = int(text.get("no_rope_layer_interval") or 4)
    rope = text.get("no_rope_layers") or [(index + 1) % every for index in range(count)]
    chunked = text.get("attention_chunk_size")
    return ((("chunked",) if chunked and has_rope else ("full",)) for has_rope in rope)


def _full_indices(text: Fields, count: int) -> set[int] | None:
    """The layers with attention, of models that list or count them among layers with a state."""
    model_type = text["model_type"]
    if model_type == "jamba":
        period, offset = int(text["attn_layer_period"]), int(text["attn_layer_offset"])
        return {index for index in range(count) if index % period == offset}
    if model_type == "bamba":
        return set(text.get("attn_layer_indices") or ())
    if model_type.startswith("lfm2") and (found := text.get("full_attn_idxs")) is not None:
        return set(found)
    if found := text.get("attn_type_list"):  # MiniMax-Text-01
        return {index for index, type in enumerate(found) if type == 1}
    if found := (text.get("linear_attn_config") or {}).get("full_attn_layers"):  # Kimi Linear
        return {index - 1 for index in found}
    return None


def _every(text: Fields) -> int | None:
    """One layer of how many attends to every token, where it is not said of each."""
    model_type = text["model_type"]
    if model_type.startswith(("qwen3_next", "qwen3_5")):
        return int(text.get("full_attention_interval") or 4)
    if _window(text) is None:
        return None
    pattern = text.get("sliding_window_pattern")
    if isinstance(pattern, str):  # EXAONE 4: "LLLG"
        return len(pattern)
    if isinstance(pattern, int):
        return pattern or None
    return _EVERY.get(model_type)


def _window(text: Fields) -> int | None:
    """Tokens that a layer with a sliding window attends to."""
    is_used = text.get("use_sliding_window", not text["model_type"].startswith("qwen"))
    if not is_used:
        return None
    window = text.get("sliding_window")
    if not isinstance(window, int) or window <= 0:
        return None
    # Command R+'s layers see one token more (``models/commandr.py``).
    return window + 1 if text["model_type"] == "cohere2" else window


def is_mla(text: Fields) -> bool:
    return bool(text.get("kv_lora_rank")) and text["model_type"] not in _DECOMPRESSED


def query_heads(text: Fields) -> int:
    """How many heads of queries there are; 0 where that is not known."""
    return text.number("num_attention_heads", "n_head", "n_heads")


def key_heads(text: Fields) -> int:
    """The same of keys and values, where layers do not differ."""
    with text.understood():
        if "kv_n_heads" in (attention := text.get("attn_config") or {}):  # DBRX
            return int(attention["kv_n_heads"])
    if text.get("multi_query") and not text.get("new_decoder_architecture"):  # Falcon
        return 1
    names = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num")
    return text.number(*names) or query_heads(text)


def experts(text: Fields) -> int:
    """How many experts a mixture has; 0 where there is none."""
    return text.number("num_experts", "num_local_experts", "n_routed_experts")


def experts_per_token(text: Fields) -> int:
    """How many of them a token is sent to."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
    return text.number(*names)


def _layer(text: Fields, kind: Kind, index: int, state: states.State | None) -> Layer:
    if kind in ("none", "shared"):
        return Layer(kind)
    if kind == "mamba":
        return Layer(kind, state=state)
    if kind == "mla":
        return Layer(kind, 1, int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0))
    if kind == "indexer":
        # Bytes, and a float32 scale of each 128 (``DeepseekV32IndexerCache``).
        size = int(text.get("index_head_dim") or 128)
        return Layer(kind, 1, size + size // 128 * 4)
    heads, size = _heads(text, index), _head_size(text)
    window = int(text["attention_chunk_size"]) if kind == "chunked" else None
    return Layer(kind, heads, size, size, _window(text) if kind == "sliding" else window)


def _heads(text: Fields, index: int) -> int:
    if found := text.get("block_configs"):  # Nemotron NAS
        return query_heads(text) // int(_attention(found[index])["n_heads_in_group"])
    return key_heads(text) or 1


def _head_size(text: Fields) -> int:
    model_type = text["model_type"]
    if model_type in _DECOMPRESSED:
        return int(text["qk_nope_head_dim"]) + int(text["qk_rope_head_dim"])
    if model_type == "zamba2":
        hidden = 2 * int(text["hidden_size"])
        return int(text.get("attention_head_dim") or hidden // (query_heads(text) or 1))
    names = ("head_dim", "hidden_size_per_head", "kv_channels", "attention_head_dim")
    hidden = text.number("hidden_size", "n_embd", "d_model")
    return text.number(*names) or hidden // (query_heads(text) or 1)


def _attention(block: Mapping[str, Any]) -> Mapping[str, Any]:
    found = block.get("attention")
    return found if isinstance(found, dict) else {}
