"""The demo model, and small models like it, as GGUF files: what llama.cpp's
``convert_hf_to_gguf.py --outtype f16`` and ``llama-quantize`` make of them, to the last byte
(``test/gguf/llama_cpp.json`` has the digests of theirs, and what llama.cpp says with them;
``scripts/gguf_answers`` makes it).

gguf-py writes the files. What it cannot quantize, libgguf does. Neither is what loads them.

    python gguf_models.py TYPE FOLDER

writes the demo model.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType, TokenType
from safetensors.torch import load_file
from tokenizers import Tokenizer

import mixtures
from checkpoints import DEMO, ROOT, WEIGHTS, Tensors, read_config

LLAMA_CPP = ROOT / "test" / "gguf" / "llama_cpp.json"

PLAIN = ("F32", "F16", "BF16")
QUANTIZED = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
)
TYPES = (*PLAIN, *QUANTIZED)
"""What a file may be made in, as llama.cpp calls it: most have weights of several types."""


def takes_libgguf(type: str) -> bool:
    """Whether a type, or the types of such a file, are among those that gguf-py only reads."""
    return type.startswith("IQ") or re.fullmatch(r"Q\d_K(_M)?", type) is not None


class Model(NamedTuple):
    """A model as Hugging Face has it."""

    name: str
    tensors: Tensors
    config: Mapping[str, Any]


def make(type: str, folder: Path) -> Path:
    """Writes the demo model in one of ``TYPES``, and returns the file."""
    return write(demo(), type, folder)


class Answers(NamedTuple):
    """What llama.cpp says with a file that it made of a model.

    Args:
        sha256: of the file
        otherwise: what it says to prompts and questions, where the demo model has learned another
            answer
        logprobs: of each token but the first of each text, which is a fact and its completion
    """

    sha256: str
    otherwise: dict[str, str]
    logprobs: npt.NDArray[np.float32]


def answers(model: str, type: str) -> Answers:
    """What llama.cpp says with the demo model, or another one of this module by its name."""
    said = json.loads(LLAMA_CPP.read_text(encoding="utf-8"))[model][type]
    return Answers(said["sha256"], said["otherwise"], np.array(said["logprobs"], np.float32))


def demo() -> Model:
    return Model("demo", load_file(DEMO / WEIGHTS), read_config(DEMO))


def mixture() -> Model:
    """A mixture of experts that knows what the demo model knows."""
    return Model("mixture", *mixtures.mixtral())


def qwen2() -> Model:
    """A Qwen2 with biases, and embeddings that are its output layer too. It knows nothing."""
    tensors = load_file(DEMO / WEIGHTS)
    del tensors["lm_head.weight"]
    torch.manual_seed(5)
    for name in list(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = torch.randn(len(tensors[name])) / 4
            tensors[name.removesuffix("weight") + "bias"] = bias.bfloat16()
    llama = ("attention_bias", "mlp_bias", "head_dim", "pretraining_tp")
    config = {key: value for key, value in read_config(DEMO).items() if key not in llama} | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
    return Model("qwen2", tensors, config)


def write(model: Model, type: str, folder: Path, parts: int = 1) -> Path:
    """Writes a Llama, a mixture of experts of one, or a Qwen2.

    Args:
        type: one of ``TYPES``
        parts: into how many files; of several, the first one is returned
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model.name}-{type}.gguf"
    tensors = dict(_converted(model))
    if type in QUANTIZED:
        # The quantizer starts from float16, and sorts.
        tensors = {name: tensors[name] for name in sorted(tensors, key=_place)}
    writer = gguf.GGUFWriter(
        path, _architecture(model), split_max_tensors=-(-len(tensors) // parts) if parts > 1 else 0
    )
    for name, tensor in tensors.items():
        kind = _type(name, tensor, type, model)
        if type in QUANTIZED and kind != Type.F32:
            tensor = tensor.astype(np.float16).astype(np.float32)
        writer.add_tensor(name, _packed(tensor, kind), raw_dtype=kind)
    _add_metadata(writer, model, type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else folder / f"{path.stem}-00001-of-{parts:05}.gguf"


def unpack(path: Path) -> Tensors:
    """The weights in a file of ``write``, as gguf-py dequantizes them, under the names and in the
    order of Hugging Face."""
    reader = gguf.GGUFReader(path)
    architecture = _field(reader, "general.architecture")
    tensors: Tensors = {}
    for tensor in reader.tensors:
        weights = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        stem, end = tensor.name.rsplit(".", 1)
        name = OUTER.get(stem)
        if name is None:
            _, layer, part = stem.split(".")
            if architecture == "llama" and part in HEADS:
                weights = _rotated_in_halves(weights, _field(reader, f"llama.{HEADS[part]}"))
            name = f"model.layers.{layer}.{PARTS[part]}"
        if "{}" in name:
            tensors |= {f"{name.format(i)}.{end}": expert for i, expert in enumerate(weights)}
        else:
            tensors[f"{name}.{end}"] = weights
    return tensors


# The names of both.

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}

# The heads of what a Llama's rotary embedding turns.
HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


# What the converter does.


def _architecture(model: Model) -> str:
    return "qwen2" if model.config["model_type"] == "qwen2" else "llama"


def _converted(model: Model) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """The tensors by their GGUF names."""
    names = {value: key for key, value in (OUTER | PARTS).items()}
    heads = {
        "attn_q": model.config["num_attention_heads"],
        "attn_k": model.config["num_key_value_heads"],
    }
    experts: dict[str, list[torch.Tensor]] = {}
    for full, tensor in sorted(model.tensors.items()):
        name, end = full.rsplit(".", 1)
        layer = ""
        if found := re.match(r"model\.layers\.(\d+)\.", name):
            layer, name = f"blk.{found[1]}.", name[found.end() :]
        if ".experts." in name:
            name = re.sub(r"\d+", "{}", name, count=1)
        part = names[name]
        tensor = tensor.float()
        if _architecture(model) == "llama" and part in heads:
            tensor = _rotated_in_pairs(tensor, heads[part])
        if "{}" not in name:
            yield f"{layer}{part}.{end}", tensor.numpy()
            continue
        experts.setdefault(layer + part, []).append(tensor)
        layers = [layer + "ffn_gate_exps", layer + "ffn_down_exps", layer + "ffn_up_exps"]
        if all(len(experts.get(one, ())) == mixtures.EXPERTS for one in layers):
            for one in layers:
                yield f"{one}.weight", torch.stack(experts.pop(one)).numpy()


def _rotated_in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """With the rows of each head in llama.cpp's order: it turns neighbours, where transformers
    turns a row of the first half with one of the second."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _rotated_in_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _add_metadata(writer: gguf.GGUFWriter, model: Model, type: str) -> None:
    config = model.config
    writer.add_type("model")
    writer.add_name(model.name.title())
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if experts := config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if dimension := config.get("head_dim"):
        writer.add_key_length(dimension)
        writer.add_value_length(dimension)
    if type in PLAIN:
        _add_file_type(writer, type)
    if _architecture(model) == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["head_dim"])
    if type in PLAIN:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer)
    if type in QUANTIZED:
        # The quantizer says both anew.
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_file_type(writer, type)


def _add_file_type(writer: gguf.GGUFWriter, type: str) -> None:
    writer.add_file_type(LlamaFileType["ALL_F32" if type == "F32" else f"MOSTLY_{type}"])


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    tokens = {id: token for token, id in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[id] for id in sorted(tokens)])
    writer.add_token_types([_token_type(added.get(id)) for id in sorted(tokens)])
    gguf.SpecialVocab(DEMO, load_merges=True).add_to_gguf(writer, quiet=True)


def _token_type(added: Any) -> TokenType:
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added.special else TokenType.USER_DEFINED


# What the quantizer does, as far as these models go.


def _place(name: str) -> tuple[int, str]:
    """Where the quantizer puts a tensor."""
    found = re.match(r"blk\.(\d+)", name)
    return int(found[1]) if found else -1, name


def _packed(tensor: npt.NDArray[np.float32], kind: Type) -> npt.NDArray[Any]:
    made: npt.NDArray[Any]
    if takes_libgguf(kind.name):
        import libgguf

        made = libgguf.quantize_rows(tensor, kind)
    else:
        made = gguf.quantize(tensor, kind)
    return made


def _type(name: str, tensor: npt.NDArray[np.float32], type: str, model: Model) -> Type:
    """What a tensor is saved in, in a file of that type."""
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        return Type.F32
    default = Type[type.removesuffix("_M")]
    if type in PLAIN:
        return default
    output = "token_embd" if model.config["tie_word_embeddings"] else "output"
    if name == f"{output}.weight":
        return Type.Q8_0 if default == Type.Q8_0 else Type.Q6_K
    layer, layers = _place(name)[0], model.config["num_hidden_layers"]
    better = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    attn_v, ffn_down, attn_output = (part in name for part in ("attn_v", "ffn_down", "attn_output"))
    match type:
        case "Q2_K" if attn_v or ffn_down or attn_output:
            return Type.Q3_K
        case "Q3_K_M" if attn_v and layer < 2:
            return Type.Q5_K
        case "Q3_K_M" if attn_v or ffn_down or attn_output:
            return Type.Q4_K
        case "Q4_K_M" | "Q5_K_M" if (attn_v or ffn_down) and better:
            return Type.Q6_K
    return default


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    assert field is not None
    return field.contents()


if __name__ == "__main__":
    print(make(sys.argv[1], Path(sys.argv[2])))
