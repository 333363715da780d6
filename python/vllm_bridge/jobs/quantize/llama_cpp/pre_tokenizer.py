"""What llama.cpp calls the way in which a tokenizer cuts texts into words.

Its converter knows tokenizers by a digest of what they make of a certain text, which depends on
their vocabulary: those of models of one's own it does not know. Here the ways to cut are compared.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

# Where the ways to cut differ: contractions, digits, runs of spaces and of newlines, symbols,
# scripts, marks, and cases.
TEXTS: Final = (
    "I'm sure they've said it's OK: DON'T, WE'LL, I'D, we'Ve a'lL o'clock",
    "3 33 333 3333 33333 333333 3.3 3..3 1,000,000 0x1F v1.2.3 x² ½ Ⅷ ١٢٣  4   56\t\t789",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nline\r\n\r\n  indented",
    "!!! ??? ((())) {} <> @#$%^&*_+=|~`/\\ a/b C:\\x //\n/* */\n!\n\n?  ! \t;",
    "camelCase SCREAMING_CASE iPhone XMLHttpRequest getHTTP ÄÖÜäöü ЖжЖ",
    "Straße naïve cafe\u0301 Привет, мир! 你好，世界！2024年 カタカナと漢字 안녕 مرحبا नमस्ते ภาษา",  # noqa: RUF001
    "😀 👨\u200d👩\u200d👧 🇩🇪 “curly” «guillemets» — …  \u3000\u00a0 a  b   c ",
    "def add(a: int) -> int:\n    return a + b\n\n\n\tprint(add(1, 2))  # three",
)


def find(folder: Path) -> str:
    """The name of a tokenizer's way to cut texts.

    Args:
        folder: of the model, with its ``tokenizer.json``

    Raises:
        BridgeError: ``unsupported`` where it is none that is known; a guess would give a model that
            reads other tokens than it was trained with
    """
    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return name(content)
    except (OSError, ValueError, KeyError) as error:
        raise BridgeError(
            "unsupported",
            f"The tokenizer of `{folder}` is not known to llama.cpp, and {error}.",
            {"model": str(folder), "known": sorted(PRE_TOKENIZERS)},
            remedy="Choose another format than GGUF for this model.",
        ) from error


def name(tokenizer: dict[str, Any]) -> str:
    """
    Args:
        tokenizer: what is in ``tokenizer.json``

    Raises:
        ValueError: where it is none that is known
    """
    if tokenizer.get("normalizer") is not None:
        # llama.cpp has none with BPE of bytes.
        raise ValueError("it changes texts before it cuts them, which llama.cpp's do not")
    own = list(_words(tokenizer["pre_tokenizer"]))
    ignores_merges = bool(tokenizer["model"].get("ignore_merges", False))
    for found, known in PRE_TOKENIZERS.items():
        if known.ignores_merges == ignores_merges and list(_words(_described(known))) == own:
            return found
    raise ValueError("it cuts texts into words as none does that llama.cpp knows")


def _words(pre_tokenizer: Any) -> Iterator[list[Any]]:
    """The words of each text; of a part of ``tokenizer.json``."""
    import tokenizers

    # A tokenizer without a vocabulary is what parses such a part.
    built = tokenizers.Tokenizer.from_str(
        json.dumps(
            {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": pre_tokenizer}
        )
    ).pre_tokenizer
    return (built.pre_tokenize_str(text) for text in TEXTS)


def _described(known: PreTokenizer) -> dict[str, Any]:
    """One of llama.cpp's, as ``tokenizer.json`` has it."""
    splits: Iterable[dict[str, Any]] = (
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in known.patterns
    )
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}
