"""Makes python/tests/gguf_tokenizers.json: what llama.cpp's tokenizer says of a few vocabularies.

    PYTHON scripts/gguf_tokenizers.py

PYTHON is that of the environment that scripts/quantized_models/build makes, with llama-cpp-python.

The vocabularies are learned here from the texts below, byte-level BPE without any pre-tokenizer, so
that there are tokens across all places where one may cut: each of llama.cpp's pre-tokenizers then
gives other ids, and a wrong one is seen.
"""

import ctypes
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

# ruff: noqa: RUF001 - texts of many scripts

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ROOT / "python" / "tests" / "gguf_tokenizers.json"

TEXTS = (
    "",
    " ",
    "Hello, world!",
    " Hello,  world!  ",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said it's OK, and we'll see: DON'T, WE'LL, I'D, o'clock, rock'n'roll",
    "12345678901234567890 3.14159 1,000,000 0x1F 1e-5 2024-11-27 v1.2.3",
    "1 12 123 1234 12345 123456 1234567   8  90\n\n\n12",
    "def add(a: int, b: int) -> int:\n    return a + b\n\n\nprint(add(1, 2))  # three\n",
    "\tif (x != NULL) {\n\t\treturn *x;\n\t}\n",
    "<html><body class=\"a\">&amp;</body></html>",
    "https://example.com/a/b?c=1&d=2#e user@example.com C:\\Users\\me /usr/bin/env",
    "   leading and trailing   ",
    "a  b   c    d     e",
    "line one\nline two\r\nline three\n\nline five\n\n\n\nline nine",
    "tabs\tand\t\ttabs \t mixed \n with \n\n newlines \n \n",
    "camelCase snake_case SCREAMING_CASE kebab-case iPhone XMLHttpRequest getHTTPResponse",
    "!!! ??? ... --- ;;; ((())) [[]] {} <> @#$%^&*_+=|~`",
    "\"double\" 'single' `back` “curly” ‘quotes’ «guillemets» — …",
    "Straße, Übergröße, naïve café, ÉCOLE, Français, piñata",
    "cafe\u0301 nai\u0308ve e\u0301\u0301 combining",
    "Привет, мир! Как дела?",
    "你好，世界！今天是2024年11月27日。",
    "こんにちは世界、カタカナと漢字。",
    "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "नमस\u094dत\u0947 द\u0941न\u093fय\u093e १२३",
    "สว\u0e31สด\u0e35ชาวโลก",
    "😀 👨\u200d👩\u200d👧 🇩🇪 ❤\ufe0f 👍🏽 done",
    "x² + y³ = ½ ≤ ∞ ≠ ∑ αβγ ⅠⅡ ①②",
    "non\u00a0breaking\u2003em\u3000ideographic \u200bzero",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "<s>already begun</s> and <unk> within<|im_end|> after",
    " <|im_end|> \n spaces around <|im_start|>  ",
    "<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1}}</tool_call>",
    "<|im_end|<|im_end|>|> <|im_start <s <0x41> ▁ ▁▁a",
    "100% of $5.00 = €4.50; A&B; C++; C#; F#; a/b; a\\b; ~/x",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt",
    "SELECT * FROM users WHERE id = 1 AND name LIKE '%o''brien%';",
    "aaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbb abababababab",
    "ÄÖÜäöüß UPPERlower lowerUPPER MixedCASEWords ЖжЖ",
)  # fmt: skip

# The vocabularies are learned from these, so that the others are no tokens as a whole.
LEARNED = TEXTS[2::2]

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
ADDED = ("<tool_call>", "</tool_call>")
# What the unigram vocabulary makes of some characters: a charsmap of Unicode's has a megabyte.
NORMALIZED = (("\t", " "), ("\u3000", " "), ("\u00bd", "1/2"), ("\u2160", "I"), ("\u2026", "..."))

# Words that no merges lead to: some pre-tokenizers take them as they are.
UNREACHED = ("Ġjumps", "Ġmixed", "Ġtempor")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _UNUSED, BYTE = range(1, 7)


def main() -> None:
    vocabularies = {
        "bytes": bytes_vocabulary(),
        "sentencepiece": sentencepiece_vocabulary("bpe"),
        "unigram": sentencepiece_vocabulary("unigram"),
        "characters": characters_vocabulary(),
        "demo": demo_vocabulary(),
    }
    cases = []
    for vocabulary, changes in every_case():
        ids, ends = llama_cpp_says(vocabularies[vocabulary] | changes)
        cases.append({"vocabulary": vocabulary, "changes": changes, "ids": ids, "ends": ends})
    written = {
        "llama_cpp": llama_cpp.__version__,
        "texts": TEXTS,
        "vocabularies": vocabularies,
        "cases": cases,
    }
    WRITTEN.write_text(json.dumps(written, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{len(cases)} cases of {len(TEXTS)} texts: {WRITTEN.stat().st_size} bytes")


def every_case() -> list[tuple[str, dict[str, Any]]]:
    """Of each pre-tokenizer that llama.cpp has one name; others of the same kind have no case."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("bytes", {"pre": pre})
        for pre in (
            "default", "gpt-2", "starcoder", "llama-bpe", "dbrx", "glm4", "qwen2", "qwen35",
            "tekken", "gpt-4o", "deepseek-v3", "deepseek-coder", "falcon", "seed-coder", "minicpm5",
        )
    ]  # fmt: skip
    cases += [
        ("bytes", {"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}),
        ("bytes", {"pre": "llama-bpe", "add_bos_token": False}),
        ("sentencepiece", {}),
        ("sentencepiece", {"add_space_prefix": False}),
        ("sentencepiece", {"add_bos_token": False, "add_eos_token": True}),
        # llama.cpp knows Phi-3 by its name: spaces go with its special tokens.
        ("sentencepiece", {"general.name": "Phi-3 mini"}),
        ("characters", {}),
        ("unigram", {}),
        ("unigram", {"add_space_prefix": True}),
        ("unigram", {"remove_extra_whitespaces": True}),
        ("demo", {}),
        ("demo", {"add_bos_token": False}),
    ]
    return cases


def bytes_vocabulary() -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
    )
    tokenizer.train_from_iterator(LEARNED * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [token for token in UNREACHED if token not in tokens]
    merges = [" ".join(pair) for pair in model["merges"]]
    return with_special("gpt2", tokens, [NORMAL] * len(tokens)) | {"merges": merges}


def demo_vocabulary() -> dict[str, Any]:
    path = ROOT / "priv" / "models" / "demo" / "tokenizer.json"
    read = json.loads(path.read_text(encoding="utf-8"))
    added = {token["id"]: token for token in read["added_tokens"]}
    tokens = sorted(read["model"]["vocab"], key=read["model"]["vocab"].get)
    for number in sorted(added.keys() - range(len(tokens))):
        tokens.append(added[number]["content"])
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [
            NORMAL if number not in added else CONTROL if added[number]["special"] else USER_DEFINED
            for number in range(len(tokens))
        ],
        "merges": [" ".join(pair) for pair in read["model"]["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "padding_token_id": 2,
        "add_bos_token": True,
    }


def sentencepiece_vocabulary(kind: str) -> dict[str, Any]:
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as rules:
        for old, new in NORMALIZED:
            rules.write(f"{ord(old):X}\t{' '.join(f'{ord(each):X}' for each in new)}\n")
        rules.flush()
        if kind == "bpe":
            settings = {"normalization_rule_name": "identity", "byte_fallback": True}
        else:
            settings = {"normalization_rule_tsv": rules.name, "pad_id": 0, "eos_id": 1}
            settings |= {"unk_id": 2, "bos_id": -1}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in LEARNED * 2 for line in text.split("\n")]),
            model_writer=model,
            model_type=kind,
            vocab_size=800 if kind == "bpe" else 400,
            character_coverage=0.98,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            max_sentencepiece_length=8,
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **settings,
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    # Its types of pieces are those of GGUF.
    vocabulary = with_special(
        "llama" if kind == "bpe" else "t5",
        [piece.piece for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
    )
    scores = [float(f"{piece.score:.4g}") for piece in proto.pieces]
    vocabulary["scores"] = scores + [-1000.0] * (len(vocabulary["tokens"]) - len(scores))
    if kind == "unigram":
        vocabulary["precompiled_charsmap"] = list(proto.normalizer_spec.precompiled_charsmap)
    return vocabulary


def characters_vocabulary() -> dict[str, Any]:
    """BPE of characters with merges, as Gemma 4 has it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[^\n]+|\n+"), "isolated"
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        limit_alphabet=150,
        show_progress=False,
        special_tokens=[*SPECIAL, *bytes_],
        max_token_length=8,
    )
    tokenizer.train_from_iterator(LEARNED * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [
        BYTE if token in bytes_ else CONTROL if token in SPECIAL else NORMAL for token in tokens
    ]
    merges = [" ".join(pair) for pair in model["merges"]]
    return with_special("gemma4", tokens, types) | {"merges": merges}


def with_special(model: str, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """A vocabulary with the special tokens that it does not have yet."""
    tokens, types = list(tokens), list(types)
    for group, kind in ((SPECIAL, CONTROL), (ADDED, USER_DEFINED)):
        for token in group:
            if token not in tokens:
                tokens.append(token)
                types.append(kind)
    return {
        "model": model,
        "tokens": tokens,
        "token_type": types,
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        "unknown_token_id": tokens.index("<unk>"),
        "padding_token_id": tokens.index("<pad>"),
    }


def llama_cpp_says(fields: dict[str, Any]) -> tuple[list[list[int]], list[int]]:
    """The ids of each text, and the tokens at which llama.cpp ends an answer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write(path, fields)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, fields
        vocab = llama_cpp.llama_model_get_vocab(model)
        ids = [tokenized(vocab, text.encode("utf-8")) for text in TEXTS]
        ends = [
            number
            for number in range(len(fields["tokens"]))
            if llama_cpp.llama_vocab_is_eog(vocab, number)
        ]
        llama_cpp.llama_model_free(model)
    return ids, ends


def tokenized(vocab: Any, text: bytes) -> list[int]:
    room = (ctypes.c_int32 * (2 * len(text) + 8))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), room, len(room), True, True)
    assert count >= 0, text
    return list(room[:count])


def write(path: Path, fields: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        name = key if "." in key else f"tokenizer.ggml.{key}"
        if key == "precompiled_charsmap":
            writer.add_array(name, bytes(value))
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
