"""Small models of random numbers from a seed, of the families that are quantized, each with a
tokenizer of its family's kind.

Their weights are as large as those of trained models: what a layer computes is as large as what it
gets, and some tokens are likelier than others by far. Of models that expect all tokens alike,
nothing could be told apart.

    python source_models.py FOLDER [NAME…]

writes them.
"""

import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PYTHON = Path(__file__).resolve().parents[1]
DEMO = PYTHON.parent / "priv" / "models" / "demo"
TEXT = PYTHON / "vllm_bridge" / "jobs" / "quantize" / "default.txt"

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"

# How many times likelier the likeliest tokens are: the deviation of the logits.
CLARITY = 2.5

_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2}
_TIED = {"tie_word_embeddings": True}

# Of each family: transformers' name of it, what differs from ``_SIZES``, and its tokenizer.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no-bos": ("llama", _TIED, "without-bos"),
    # Neither blocks of 32 nor groups of 64 divide these rows.
    "odd": ("llama", {"hidden_size": 144, "intermediate_size": 208, "head_dim": 36}, "bytes"),
    # Blocks of 32 divide these, and those of 256 do not.
    "narrow": ("llama", {"hidden_size": 192, "intermediate_size": 416, "head_dim": 48}, "bytes"),
    "mistral": ("mistral", {"sliding_window": 64}, "sentencepiece"),
    "qwen2": ("qwen2", _TIED, "qwen2"),
    "qwen3": ("qwen3", {}, "qwen2"),
    "gemma2": ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 64} | _TIED, "gemma"),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 64, "num_hidden_layers": 6, "query_pre_attn_scalar": 64} | _TIED,
        "gemma",
    ),
    "phi": ("phi3", {}, "sentencepiece"),
    "mixtral": ("mixtral", {"num_local_experts": 4} | _EXPERTS, "sentencepiece"),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 256, "norm_topk_prob": True} | _EXPERTS,
        "qwen2",
    ),
}


# As the tokenizers of these families begin a text.
_BEGINNING = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<s>", "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def make(name: str, folder: Path) -> Path:
    """Writes the model of that name into a folder of that name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, differs, tokenizer = MODELS[name]
    made = folder / name
    size = _write_tokenizer(tokenizer, made)
    torch.manual_seed(5)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **(_SIZES | differs | tokens), vocab_size=size)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _fill(model)
    model.save_pretrained(made)
    return made


def make_seeing(folder: Path) -> Path:
    """Writes a Gemma 3 that takes pictures, too, into the folder ``seeing``."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    made = folder / "seeing"
    size = _write_tokenizer("gemma", made)
    torch.manual_seed(5)
    config = Gemma3Config(
        text_config=_SIZES | MODELS["gemma3"][1] | {"vocab_size": size},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        **_TIED,
    )
    model = Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    _fill(model)
    model.save_pretrained(made)
    return made


def _fill(model: Any) -> None:
    is_gemma = model.config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                size = CLARITY if "embed_tokens" in name or "lm_head" in name else 1.0
                torch.nn.init.normal_(weight, std=size / weight.shape[-1] ** 0.5)
                if is_gemma and "embed_tokens" in name:
                    # It multiplies them with this root, and they would be all that it sees.
                    weight /= weight.shape[-1] ** 0.5
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.25)
            else:
                weight += torch.randn_like(weight) / 8
                if is_gemma and name.endswith("model.norm.weight"):
                    weight += len(weight) ** 0.5


def _write_tokenizer(kind: str, folder: Path) -> int:
    """Writes the files of a tokenizer, and returns how many tokens it has."""
    folder.mkdir(parents=True)
    if kind in ("bytes", "qwen2"):
        return _write_bytes(kind, folder)
    shutil.copy(_sentencepiece(kind), folder / "tokenizer.model")
    from transformers import GemmaTokenizer, LlamaTokenizer

    made = (GemmaTokenizer if kind == "gemma" else LlamaTokenizer).from_pretrained(
        folder, bos_token=BOS, eos_token=EOS, mask_token=UNKNOWN
    )
    made.save_pretrained(folder)
    if kind != "without-bos":
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        content["post_processor"] = _BEGINNING
        (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return len(made)


def _write_bytes(kind: str, folder: Path) -> int:
    """The demo model's, which cuts texts into words as GPT-2 does, or as Qwen2 does."""
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    if kind == "qwen2":
        from vllm_bridge.jobs.quantize.llama_cpp import pre_tokenizer
        from vllm_bridge.quantization.gguf.pre_tokenizers import PRE_TOKENIZERS

        content["pre_tokenizer"] = pre_tokenizer._described(PRE_TOKENIZERS["qwen2"])
        (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return 1024


@functools.cache
def _sentencepiece(kind: str) -> Path:
    """A ``tokenizer.model`` with bytes for what it does not know, as Llama's and Gemma's are."""
    import sentencepiece

    folder = Path(tempfile.mkdtemp())
    lines = [line for line in TEXT.read_text("utf-8").splitlines() if line.isascii()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / kind),
        model_type="bpe",
        vocab_size=1024,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=kind != "gemma",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / f"{kind}.model"


if __name__ == "__main__":
    for name in sys.argv[2:] or MODELS:
        print(make(name, Path(sys.argv[1])))
