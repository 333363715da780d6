"""What ``config.json`` would say of the model in a GGUF file.

Sources: what llama.cpp's converter writes of each architecture and what llama.cpp takes for granted
where a file says nothing; what is read by transformers (its GGUF support), with which a test
compares.
"""

import math
import re
import struct
from array import array
from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm_bridge.checkpoints.gguf import File
from vllm_bridge.errors import BridgeError

Config = dict[str, Any]

# What llama.cpp calls the mixtures of types that its quantizer makes: its `llama_ftype`.
FILE_TYPES: Final[Mapping[int, str]] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
    39: "NVFP4", 40: "Q1_0",
}  # fmt: skip

_HUB: Final = "https://huggingface.co/"

# What llama.cpp adds to the number where it was not told one.
_GUESSED: Final = 1024

# Larger numbers than models have. They bound what is made of them.
_MOST: Final = 2**31 - 1

_LARGEST_THETA: Final = 1e12

# The tensors whose numbers are part of the config. Of all others it counts what they look like.
FACTORS: Final = ("rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight")
_LONG, _SHORT, _FREQUENCIES = FACTORS

_BLOCK = re.compile(r"blk\.(\d+)\.")

# How Llama 3.1 and later scale their positions, beside the factor. Files have what comes of it.
_LLAMA3: Final = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# 32-bit floats that were computed in another order differ by less.
_CLOSE: Final = 1e-4


def config(file: File) -> Config:
    """A config as transformers and vLLM read it.

    No file says which dtype a model was trained in; it is taken to be bfloat16, as most are. Its
    ``quantization_config`` has, beside the method, ``architecture``, the file's name of it,
    ``types``: which part of the weights of matrices is of which of ggml's types, most first; and as
    far as the file says so ``file_type``, how llama.cpp calls such a mixture, ``quantized_by`` and
    ``base_model``, a name on the hub.

    Raises:
        BridgeError: ``unsupported_model`` for an architecture of which nothing is known here;
            ``invalid_checkpoint`` where the file does not say what it must, or what cannot be
    """
    model = _Model(file)
    found = _ARCHITECTURES[model.architecture](model)
    return found | {
        "dtype": "bfloat16",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "quantization_config": {
            "quant_method": "gguf",
            "architecture": model.architecture,
            "types": _types(file),
            **_signature(file.metadata),
        },
    }


def unsupported(file: File, what: str, **details: Any) -> BridgeError:
    """The error for a model that is only read in another form here.

    Args:
        what: the sentence about it
    """
    return BridgeError(
        "unsupported_model",
        what,
        {"file": file.path, **details},
        remedy="Use the model in the form that Hugging Face has it in.",
    )


def architectures() -> tuple[str, ...]:
    """The architectures that files may have, by the names that llama.cpp gives them."""
    return tuple(_ARCHITECTURES)


class _Model:
    """A file's values, checked. Keys are without the architecture that they begin with."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.metadata = file.metadata
        self.architecture = self._architecture()
        self.layers = self._layers()

    def _architecture(self) -> str:
        found = self.metadata.get("general.architecture")
        if isinstance(found, str) and found in _ARCHITECTURES:
            return found
        if not isinstance(found, str):
            raise self.wrong("it does not say of which architecture the model is")
        raise unsupported(
            self.file,
            f"`{self.file.path}` is of the architecture {found:.64}, which is not read from GGUF "
            f"files here. These are: {', '.join(_ARCHITECTURES)}.",
            architecture=found[:64],
            allowed=list(_ARCHITECTURES),
        )

    def _layers(self) -> int:
        layers = self.integer("block_count")
        held = {int(match[1]) for match in map(_BLOCK.match, self.file.tensors) if match}
        if not self.file.tensors:
            raise self.wrong("it holds no weights, only what belongs to a tokenizer")
        if len(held) != layers:
            raise self.wrong(
                f"it says that the model has {layers} layers, and holds weights of {len(held)}"
            )
        return layers

    def wrong(self, what: str, **details: Any) -> BridgeError:
        return BridgeError(
            "invalid_checkpoint",
            f"`{self.file.path}` does not describe a model: {what}.",
            {"file": self.file.path, **details},
            remedy="Download it again, or use another variant of the model.",
        )

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def value(self, key: str, default: Any) -> Any:
        full = f"{self.architecture}.{key}"
        found = self.metadata.get(full, default)
        if found is None:
            raise self.wrong(f"it lacks `{full}`", key=full)
        # Some have a number for each layer.
        if isinstance(found, (array, tuple)):
            if len(set(found)) != 1:
                raise unsupported(
                    self.file,
                    f"The layers of the model in `{self.file.path}` have different values of "
                    f"`{full}`.",
                    key=full,
                )
            return found[0]
        return found

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= _MOST:
            raise self.unfit(key, found)
        return found

    def real(self, key: str, default: float | None = None) -> float:
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise self.unfit(key, found)
        if not math.isfinite(found) or found < 0:
            raise self.unfit(key, found)
        return _decimal(float(found))

    def text(self, key: str, default: str) -> str:
        found = self.value(key, default)
        if not isinstance(found, str):
            raise self.unfit(key, found)
        return found

    def unfit(self, key: str, found: Any) -> BridgeError:
        full = f"{self.architecture}.{key}"
        return self.wrong(f"its `{full}` is {found!r:.64}", key=full)

    def rows(self, name: str, at: int = 0) -> int | None:
        """A size of a tensor; None where there is no such tensor."""
        tensor = self.file.tensors.get(name)
        return tensor.shape[at] if tensor is not None and len(tensor.shape) > at else None

    def floats(self, name: str, count: int) -> list[float] | None:
        """The numbers that a small tensor holds; None where there is no such tensor."""
        tensor = self.file.tensors.get(name)
        if tensor is None:
            return None
        if tensor.dtype != "F32" or tensor.shape != (count,):
            raise self.wrong(
                f"`{name}` is {tensor.dtype} {list(tensor.shape)} and should be F32 [{count}]",
                tensor=name,
            )
        try:
            with open(tensor.file, "rb") as file:
                file.seek(tensor.start)
                found = [_decimal(number) for number in array("f", file.read(tensor.size))]
        except (OSError, ValueError) as error:
            raise self.wrong(f"`{name}` cannot be read ({error})", tensor=name) from error
        if len(found) != count or not all(number > 0 and math.isfinite(number) for number in found):
            raise self.wrong(f"`{name}` does not hold {count} factors", tensor=name)
        return found

    def heads(self) -> tuple[int, int, int]:
        """How many of queries and of keys, and the size of each."""
        queries = self.integer("attention.head_count")
        keys = self.integer("attention.head_count_kv", queries)
        size = self.integer("attention.key_length", max(self.hidden // queries, 1))
        if self.integer("attention.value_length", size) != size:
            raise unsupported(
                self.file,
                f"Keys and values of the model in `{self.file.path}` are of different sizes, which "
                "is not read from GGUF files here.",
            )
        if queries % keys:
            raise self.wrong(f"it has {queries} heads of queries for {keys} of keys")
        return queries, keys, size

    @property
    def hidden(self) -> int:
        return self.integer("embedding_length")

    @property
    def vocabulary(self) -> int:
        rows = self.rows("token_embd.weight")
        if rows is None:
            raise self.wrong("it lacks `token_embd.weight`", tensor="token_embd.weight")
        tokens = self.metadata.get("tokenizer.ggml.tokens", ())
        if not isinstance(tokens, tuple) or len(tokens) > rows:
            raise self.wrong(
                f"its tokenizer has {len(tokens) if isinstance(tokens, tuple) else tokens!r:.64} "
                f"tokens, and `token_embd.weight` {rows} rows",
                key="tokenizer.ggml.tokens",
            )
        return rows

    def token(self, name: str) -> int | None:
        """The id of a special token."""
        key = f"tokenizer.ggml.{name}_token_id"
        found = self.metadata.get(key)
        if found is None or found == 2**32 - 1:  # what some write where there is none
            return None
        if (
            isinstance(found, bool)
            or not isinstance(found, int)
            or not 0 <= found < self.vocabulary
        ):
            raise self.wrong(f"its `{key}` is {found!r:.64}, which is no token", key=key)
        return found


def _common(model: _Model, model_type: str, name: str, norm: str) -> Config:
    """What all models have.

    Args:
        name: of the class that computes the model
        norm: what a config calls the epsilon of its norms, ``rms_norm_eps`` or another
    """
    queries, keys, size = model.heads()
    epsilon = "rms_epsilon" if norm == "rms_norm_eps" else "epsilon"
    ids = {f"{kind}_token_id": model.token(name) for kind, name in _SPECIAL.items()}
    return {
        "model_type": model_type,
        "architectures": [name],
        "hidden_size": model.hidden,
        "intermediate_size": _intermediate(model),
        "num_hidden_layers": model.layers,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "head_dim": size,
        "max_position_embeddings": model.integer("context_length"),
        "vocab_size": model.vocabulary,
        norm: model.real(f"attention.layer_norm_{epsilon}"),
        "rope_parameters": _rope(model, size),
        **{key: value for key, value in ids.items() if value is not None},
    }


_SPECIAL: Final = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _intermediate(model: _Model) -> int:
    """Mixtures may be without the size of what they do not have."""
    if model.has("feed_forward_length"):
        return model.integer("feed_forward_length")
    return model.integer("expert_feed_forward_length", model.rows("blk.0.ffn_gate_exps.weight", 1))


def _rope(model: _Model, head: int) -> Config:
    rotated = model.integer("rope.dimension_count", head)
    theta = model.real("rope.freq_base", 10000.0)
    if rotated > head:
        raise model.unfit("rope.dimension_count", rotated)
    if not 1.0 < theta < _LARGEST_THETA:
        raise model.unfit("rope.freq_base", theta)
    rope: Config = {"rope_type": "default", "rope_theta": theta}
    if rotated != head:
        rope["partial_rotary_factor"] = rotated / head
    if (long := model.floats(_LONG, rotated // 2)) is not None:
        original = model.integer("rope.scaling.original_context_length")
        return rope | {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": model.floats(_SHORT, rotated // 2) or long,
            "original_max_position_embeddings": original,
        }
    if (factors := model.floats(_FREQUENCIES, rotated // 2)) is not None:
        return rope | _llama3(model, factors, theta, rotated)
    return rope | _scaling(model)


def _scaling(model: _Model) -> Config:
    kind = model.text("rope.scaling.type", "linear")
    factor = model.real("rope.scaling.factor", model.real("rope.scale_linear", 0.0))
    if kind == "none" or factor in (0.0, 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise unsupported(
            model.file,
            f"The model in `{model.file.path}` scales its positions by {kind:.64}, which is not "
            "read from GGUF files here.",
        )
    optional = {
        "attention_factor": "rope.scaling.yarn_attn_factor",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": model.integer(
            "rope.scaling.original_context_length", model.integer("context_length")
        ),
        **{name: model.real(key) for name, key in optional.items() if model.has(key)},
    }


def _llama3(model: _Model, factors: list[float], theta: float, rotated: int) -> Config:
    """The scaling of which a file has the factors for each frequency: 1 for high ones, ``factor``
    for low ones, and in between by their wavelengths.

    With the lower bound set to 1, as the formula does not change if all three numbers that bound
    it are multiplied, two of those in between tell the others.
    """
    factor = max(factors)
    if factor == 1.0:
        return {}
    scaling: Config = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    waves = [2 * math.pi * theta ** (2 * i / rotated) for i in range(rotated // 2)]
    if not _are_llama3(factors, waves, scaling):
        # 1 / f = (1 - s) / factor + s, where s = slope / wave - offset
        smooth = [
            (1 / wave, (1 / found - 1 / factor) / (1 - 1 / factor))
            for found, wave in zip(factors, waves, strict=True)
            if 1.0 < found < factor
        ]
        if len(smooth) >= 2:
            (x1, y1), (x2, y2) = smooth[0], smooth[-1]
            slope = (y1 - y2) / (x1 - x2)
            offset = slope * x1 - y1
            if offset > _CLOSE and slope < _MOST:
                high = round(1 + 1 / offset, 3)
                scaling["high_freq_factor"] = high
                scaling["original_max_position_embeddings"] = round(slope * (high - 1))
        if not _are_llama3(factors, waves, scaling):
            raise unsupported(
                model.file,
                f"`{model.file.path}` has a `rope_freqs.weight` that is not of Llama 3's kind.",
                tensor="rope_freqs.weight",
            )
    return scaling


def _are_llama3(factors: list[float], waves: list[float], scaling: Config) -> bool:
    factor, low, high = (scaling[f"{name}factor"] for name in ("", "low_freq_", "high_freq_"))
    original = scaling["original_max_position_embeddings"]
    for found, wave in zip(factors, waves, strict=True):
        smooth = min(max((original / wave - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        if not math.isclose(found, 1 / ((1 - smooth) / factor + smooth), rel_tol=_CLOSE):
            return False
    return True


_QKV: Final = ("attn_q", "attn_k", "attn_v")


def _has_biases(model: _Model, *stems: str) -> bool:
    """Whether these of each layer have biases; a config knows all or none."""
    keys = [f"blk.{number}.{stem}.bias" for number in range(model.layers) for stem in stems]
    there = [key in model.file.tensors for key in keys]
    if any(there) and not all(there):
        key = keys[there.index(False)]
        raise unsupported(
            model.file,
            f"`{model.file.path}` lacks `{key}`, and has others of its kind.",
            tensor=key,
        )
    return all(there)


def _types(file: File) -> dict[str, float]:
    """The part of the weights in matrices that each type has."""
    counts: dict[str, int] = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
    total = sum(counts.values())
    most_first = sorted(counts.items(), key=lambda item: -item[1])
    return {name: round(count / total, 4) for name, count in most_first}


def _signature(metadata: Mapping[str, Any]) -> Config:
    """What a file says of how it was quantized, and by whom."""
    kind, author = (metadata.get(f"general.{key}") for key in ("file_type", "quantized_by"))
    found: Config = {}
    if isinstance(kind, int) and kind % _GUESSED in FILE_TYPES:
        found["file_type"] = FILE_TYPES[kind % _GUESSED]
    if isinstance(author, str) and author:
        found["quantized_by"] = author
    url = metadata.get("general.base_model.0.repo_url")
    if isinstance(url, str) and url.startswith(_HUB):
        found["base_model"] = url.removeprefix(_HUB)
    return found


def _decimal(number: float) -> float:
    """The number that was meant by a 32-bit float: 1e-06, not 9.999999974752427e-07."""
    short = float(f"{number:.7g}")
    try:
        return short if struct.pack("<f", short) == struct.pack("<f", number) else number
    except OverflowError:
        return number


# -- what single architectures have beside that


def _llama(model: _Model) -> Config:
    is_mixture = model.integer("expert_count", 0, least=0) > 0
    if is_mixture:
        return _common(model, "mixtral", "MixtralForCausalLM", "rms_norm_eps") | {
            "hidden_act": "silu",
            "sliding_window": None,
            "num_local_experts": model.integer("expert_count"),
            "num_experts_per_tok": model.integer("expert_used_count"),
        }
    return _common(model, "llama", "LlamaForCausalLM", "rms_norm_eps") | {
        "hidden_act": "silu",
        "attention_bias": _has_biases(model, *_QKV, "attn_output"),
        "mlp_bias": _has_biases(model, "ffn_gate", "ffn_up", "ffn_down"),
    }


def _qwen2(model: _Model) -> Config:
    return _common(model, "qwen2", "Qwen2ForCausalLM", "rms_norm_eps") | {
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _qwen3(model: _Model) -> Config:
    return _common(model, "qwen3", "Qwen3ForCausalLM", "rms_norm_eps") | {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": _has_biases(model, *_QKV, "attn_output"),
    }


def _qwen2_moe(model: _Model) -> Config:
    shared = model.rows("blk.0.ffn_gate_shexp.weight")
    return _common(model, "qwen2_moe", "Qwen2MoeForCausalLM", "rms_norm_eps") | {
        **_experts(model),
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": model.integer(
            "expert_shared_feed_forward_length", shared
        ),
    }


def _qwen3_moe(model: _Model) -> Config:
    return _common(model, "qwen3_moe", "Qwen3MoeForCausalLM", "rms_norm_eps") | {
        **_experts(model),
        "norm_topk_prob": True,
        "attention_bias": _has_biases(model, *_QKV, "attn_output"),
    }


def _experts(model: _Model) -> Config:
    size = model.rows("blk.0.ffn_gate_exps.weight", 1)
    return {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": model.integer("expert_count"),
        "num_experts_per_tok": model.integer("expert_used_count"),
        "moe_intermediate_size": model.integer("expert_feed_forward_length", size),
    }


_GELU: Final = "gelu_pytorch_tanh"


def _gemma(model: _Model) -> Config:
    return _common(model, "gemma", "GemmaForCausalLM", "rms_norm_eps") | {
        "hidden_act": _GELU,
        "hidden_activation": _GELU,
    }


def _gemma2(model: _Model) -> Config:
    found = _common(model, "gemma2", "Gemma2ForCausalLM", "rms_norm_eps")
    return found | {
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": _query_scalar(found, layers_of_27b=46),
        "attn_logit_softcapping": model.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": model.real("final_logit_softcapping", 30.0),
        "sliding_window": model.integer("attention.sliding_window", 4096),
        "layer_types": _layer_types(model, every=2),
    }


def _gemma3(model: _Model) -> Config:
    found = _common(model, "gemma3_text", "Gemma3ForCausalLM", "rms_norm_eps")
    window = model.integer("attention.sliding_window", 0, least=0)
    local = {"rope_type": "default", "rope_theta": model.real("rope.freq_base_swa", 10000.0)}
    return found | {
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": _query_scalar(found, layers_of_27b=62),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": model.real("final_logit_softcapping", 0.0) or None,
        "sliding_window": window or None,
        "layer_types": _layer_types(model, every=6 if window else 1),
        "rope_parameters": {
            "full_attention": found["rope_parameters"],
            "sliding_attention": local,
        },
    }


def _query_scalar(found: Config, layers_of_27b: int) -> int:
    """No file has it. llama.cpp tells the largest Gemma, which has another, by its layers."""
    if found["num_hidden_layers"] == layers_of_27b:
        return int(found["hidden_size"] // found["num_attention_heads"])
    return int(found["head_dim"])


def _layer_types(model: _Model, every: int) -> list[str]:
    """Which layers look at all positions: each ``every``-th, if the file does not say otherwise."""
    full = f"{model.architecture}.attention.sliding_window_pattern"
    given = model.metadata.get(full)
    if isinstance(given, (tuple, array)):
        if len(given) != model.layers:
            raise model.wrong(f"its `{full}` is of {len(given)} layers", key=full)
        are_local = [bool(one) for one in given]
    else:
        step = every if given is None else model.integer("attention.sliding_window_pattern")
        are_local = [(number + 1) % step != 0 for number in range(model.layers)]
    return ["sliding_attention" if local else "full_attention" for local in are_local]


def _phi2(model: _Model) -> Config:
    return _common(model, "phi", "PhiForCausalLM", "layer_norm_eps") | {
        "hidden_act": "gelu_new",
        "qk_layernorm": False,
    }


def _phi3(model: _Model) -> Config:
    found = _common(model, "phi3", "Phi3ForCausalLM", "rms_norm_eps")
    original = model.integer(
        "rope.scaling.original_context_length", found["max_position_embeddings"]
    )
    return found | {
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "sliding_window": model.integer("attention.sliding_window", 0, least=0) or None,
    }


def _stablelm(model: _Model) -> Config:
    if "blk.0.ffn_norm.weight" not in model.file.tensors:
        raise BridgeError(
            "unsupported_model",
            f"The model in `{model.file.path}` is a StableLM with parallel residuals, which vLLM "
            "does not compute.",
            {"file": model.file.path},
            remedy="Use another model.",
        )
    return _common(model, "stablelm", "StableLmForCausalLM", "layer_norm_eps") | {
        "hidden_act": "silu",
        "use_qkv_bias": _has_biases(model, *_QKV),
        "use_parallel_residual": False,
    }


def _starcoder2(model: _Model) -> Config:
    return _common(model, "starcoder2", "Starcoder2ForCausalLM", "norm_epsilon") | {
        "hidden_act": _GELU,
        "use_bias": True,
        "sliding_window": None,
    }


def _nemotron(model: _Model) -> Config:
    return _common(model, "nemotron", "NemotronForCausalLM", "norm_eps") | {
        "hidden_act": "relu2",
        "attention_bias": _has_biases(model, *_QKV, "attn_output"),
        "mlp_bias": _has_biases(model, "ffn_up", "ffn_down"),
    }


_ARCHITECTURES: Final[Mapping[str, Callable[[_Model], Config]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi2": _phi2,
    "phi3": _phi3,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "nemotron": _nemotron,
}
