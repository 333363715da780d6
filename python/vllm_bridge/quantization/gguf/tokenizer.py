"""The tokenizer of a GGUF file, as Hugging Face has it: the contents of ``tokenizer.json`` and of
the files beside it.

A GGUF file has tokens with their types, merges or scores, and the ids of special tokens; the rest
is a convention, and llama.cpp's is the one by which such files are made. What is built here gives
the ids that llama.cpp gives, special tokens in the text included.
"""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization.gguf.pre_tokenizers import LINES, PRE_TOKENIZERS
from vllm_bridge.quantization.gguf.vocabulary import PREFIX, Type, Vocabulary, ends

_TEMPLATE: Final = "tokenizer.chat_template"

# What SentencePiece has for a space.
_SPACE: Final = "▁"

# Sampling parameters, by the keys of files that have them.
_SAMPLING: Final = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


class Files(NamedTuple):
    """What a tokenizer is in Hugging Face's files.

    Args:
        tokenizer: the text of ``tokenizer.json``
        config: what is in ``tokenizer_config.json``, chat templates too
    """

    tokenizer: str
    config: dict[str, Any]


def files(path: str, metadata: Mapping[str, Any]) -> Files:
    """The tokenizer of a GGUF file.

    Args:
        path: of the file, for what is said of it
        metadata: what it says

    Raises:
        BridgeError: ``unsupported`` for a kind of tokenizer that is not known here,
            ``invalid_checkpoint`` for a tokenizer or a chat template that makes no sense
    """
    vocabulary = Vocabulary(path, metadata)
    build = _BUILDERS.get(vocabulary.model)
    if build is None:
        raise _unsupported(path, "tokenizer", vocabulary.model, _BUILDERS)
    built = build(vocabulary)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(vocabulary)),
        "normalizer": built.normalizer,
        "pre_tokenizer": built.pre_tokenizer,
        "post_processor": _post_processor(vocabulary, built),
        "decoder": built.decoder,
        "model": built.model,
    }
    text = json.dumps(tokenizer, ensure_ascii=False)
    _check(vocabulary, text)
    config = _config(vocabulary)
    if templates := _chat_templates(path, metadata):
        config["chat_template"] = (
            templates["default"]
            if templates.keys() == {"default"}
            else [{"name": name, "template": template} for name, template in templates.items()]
        )
    return Files(text, config)


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ``generation_config.json`` of a GGUF file's model: all tokens that end an answer, and how
    to sample."""
    found: dict[str, Any] = {}
    if ids := ends(metadata):
        found["eos_token_id"] = ids
    for key, name in _SAMPLING.items():
        if isinstance(value := metadata.get(key), int | float):
            found[name] = value
    return found


class _Built(NamedTuple):
    """The parts of a ``tokenizer.json`` that depend on the kind of tokenizer.

    Args:
        bos: whether texts begin with BOS where the file does not say
        eos: whether they end with EOS where it does not
    """

    model: dict[str, Any]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any]
    bos: bool = False
    eos: bool = False


def _byte_level(vocabulary: Vocabulary) -> _Built:
    """BPE of bytes: GPT-2's and most of those since."""
    name = vocabulary.pre_tokenizer
    pre_tokenizer = PRE_TOKENIZERS.get(name)
    if pre_tokenizer is None:
        raise _unsupported(vocabulary.path, "pre-tokenizer", name, PRE_TOKENIZERS)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return _Built(
        model=_bpe(vocabulary, vocabulary.merges, ignore_merges=pre_tokenizer.ignores_merges),
        normalizer=None,
        pre_tokenizer=_sequence("pretokenizers", *map(_split, pre_tokenizer.patterns), byte_level),
        decoder=byte_level,
        bos=pre_tokenizer.adds_bos,
    )


def _lines(vocabulary: Vocabulary) -> _Built:
    """BPE of characters with merges: Gemma 4's."""
    return _Built(
        model=_bpe(vocabulary, vocabulary.merges, byte_fallback=True),
        normalizer=_replace(" ", _SPACE),
        pre_tokenizer=_split(LINES),
        decoder=_sequence("decoders", *_unescaped(prefixed=False)),
        bos=True,
    )


def _sentencepiece(vocabulary: Vocabulary) -> _Built:
    """BPE of SentencePiece: Llama's, Mistral's and Gemma's. Its merges are in the scores."""
    normalizer = [_replace(" ", _SPACE)]
    # By a normalizer, because that sees what is after a special token as a text of its own.
    if prefixed := vocabulary.flag("add_space_prefix", True):
        normalizer.insert(0, {"type": "Prepend", "prepend": _SPACE})
    unknown = vocabulary.special("unknown")
    return _Built(
        model=_bpe(
            vocabulary,
            list(_implied_merges(vocabulary)),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
        normalizer=_sequence("normalizers", *normalizer),
        pre_tokenizer=None,
        decoder=_sequence("decoders", *_unescaped(prefixed)),
        bos=True,
    )


def _unigram(vocabulary: Vocabulary) -> _Built:
    """SentencePiece's other model: T5's and XLM-RoBERTa's."""
    unknown = vocabulary.special("unknown")
    if unknown is None:
        raise vocabulary.invalid("it has no unknown token")
    merged = vocabulary.flag("remove_extra_whitespaces", False)
    prefixed = merged or vocabulary.flag("add_space_prefix", False)
    normalizer: list[dict[str, Any]] = []
    if (charsmap := vocabulary.charsmap) is not None:
        encoded = base64.b64encode(charsmap).decode("ascii")
        normalizer.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if merged:
        normalizer.append(_replace(r"\A +| +\z", "", "Regex"))
        normalizer.append(_replace(" {2,}", " ", "Regex"))
    if prefixed:
        normalizer.append(_replace(r"\A(?= *[^ ])", " ", "Regex"))
    return _Built(
        model={
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": list(zip(vocabulary.tokens, vocabulary.scores, strict=True)),
            "byte_fallback": False,
        },
        normalizer=_sequence("normalizers", *normalizer, _replace(" ", _SPACE)),
        pre_tokenizer=None,
        decoder=_sequence("decoders", *_unescaped(prefixed)),
        eos=True,
    )


def _unescaped(prefixed: bool) -> Iterator[dict[str, Any]]:
    """The decoders that make text of SentencePiece's tokens.

    Args:
        prefixed: whether texts got a space before them
    """
    yield _replace(_SPACE, " ")
    yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if prefixed:
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


# By llama.cpp's names of them.
_BUILDERS: Final[Mapping[str, Callable[[Vocabulary], _Built]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "t5": _unigram,
    "gemma4": _lines,
}


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **settings: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary.ids,
        "merges": merges,
    } | settings


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _sequence(kind: str, *parts: Mapping[str, Any]) -> dict[str, Any]:
    """One after the other.

    Args:
        kind: what a ``tokenizer.json`` calls them: ``normalizers``, ``pretokenizers``, ``decoders``
    """
    return {"type": "Sequence", kind: list(parts)}


def _implied_merges(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """All pairs of tokens that make a token, the best scores first: SentencePiece joins the two
    neighbours whose token has the best."""
    ids, scores = vocabulary.ids, vocabulary.scores
    joined = [
        number for number, kind in enumerate(vocabulary.types) if kind in (Type.NORMAL, Type.UNUSED)
    ]
    for number in sorted(joined, key=lambda number: -scores[number]):
        token = vocabulary.tokens[number]
        for end in range(1, len(token)):
            if token[:end] in ids and token[end:] in ids:
                yield token[:end], token[end:]


def _added_tokens(vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    """The tokens that are found in a text as they are, before anything else."""
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (Type.UNKNOWN, Type.CONTROL, Type.USER_DEFINED):
            strips = vocabulary.strips_after_special and token not in (
                "<unk>", "<s>", "<|endoftext|>",
            )  # fmt: skip
            yield {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": strips,
                "normalized": False,
                "special": kind != Type.USER_DEFINED,
            }


def _post_processor(vocabulary: Vocabulary, built: _Built) -> dict[str, Any] | None:
    """What puts BOS and EOS around a text."""
    around = {
        name: vocabulary.special(name) if vocabulary.flag(f"add_{name}_token", default) else None
        for name, default in (("bos", built.bos), ("eos", built.eos))
    }
    for name, number in around.items():
        if number is None and vocabulary.flag(f"add_{name}_token", False):
            raise vocabulary.invalid(
                f"`{PREFIX}add_{name}_token` asks for a token, and no "
                f"`{PREFIX}{name}_token_id` says which"
            )
    used = {vocabulary.tokens[number]: number for number in around.values() if number is not None}
    if not used:
        return None

    def text(of: str, type_id: int) -> list[dict[str, Any]]:
        before, after = (
            [{"SpecialToken": {"id": vocabulary.tokens[number], "type_id": type_id}}]
            if number is not None
            else []
            for number in around.values()
        )
        return [*before, {"Sequence": {"id": of, "type_id": type_id}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in used.items()
        },
    }


def _check(vocabulary: Vocabulary, text: str) -> None:
    """Whether Hugging Face takes a ``tokenizer.json`` for what the file says."""
    import tokenizers

    for name in ("eot", "eom"):
        vocabulary.special(name)
    try:
        size = tokenizers.Tokenizer.from_str(text).get_vocab_size()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust's panics are no `Exception`.
        raise vocabulary.invalid(str(error).strip().rstrip(".")) from error
    if size != len(vocabulary.tokens):
        raise vocabulary.invalid(
            f"it has {len(vocabulary.tokens)} tokens, of which {size} are kept"
        )


def _config(vocabulary: Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        # Any other class would put parts of its own into the tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if (length := vocabulary.context_length) is not None:
        config["model_max_length"] = length
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (number := vocabulary.special(key)) is not None:
            config[f"{name}_token"] = vocabulary.tokens[number]
    return config


def _chat_templates(path: str, metadata: Mapping[str, Any]) -> Mapping[str, str]:
    """By their names; the model's usual one is ``default``."""
    templates = {}
    for key, template in metadata.items():
        name = "default" if key == _TEMPLATE else key.removeprefix(f"{_TEMPLATE}.")
        if name != key and isinstance(template, str):
            _check_template(path, key, template)
            templates[name] = template
    return templates


def _check_template(path: str, key: str, template: str) -> None:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(template)
    except jinja2.TemplateError as error:
        raise BridgeError(
            "invalid_checkpoint",
            f"The chat template in `{path}` (`{key}`) makes no sense: {error}.",
            {"file": path, "key": key},
            remedy=(
                "Name the model's own tokenizer, which has one too, by the option `tokenizer`: a "
                "folder or a name on the hub."
            ),
        ) from error


def _unsupported(path: str, kind: str, name: str, known: Iterable[str]) -> BridgeError:
    return BridgeError(
        "unsupported",
        f"`{path}` has a {kind} that is not known here: {name!r}. Known are "
        f"{', '.join(sorted(known))}.",
        {"file": path, kind: name, "known": sorted(known)},
        remedy=(
            "Name the model's own tokenizer by the option `tokenizer`: a folder or a name on the "
            "hub."
        ),
    )
