"""What a GGUF file says of its tokens, and what llama.cpp knows of them by their texts."""

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm_bridge.errors import BridgeError

# ruff: noqa: RUF001 - tokens of many models, as they are

PREFIX: Final = "tokenizer.ggml."


class Type(enum.IntEnum):
    """What kind of token one is, as files have it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Tokens that end an answer, whatever a file says of them. Files name one end token, rarely two.
_ENDS: Final = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]",
        "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[",
    )
)  # fmt: skip

# Of code that is filled in: those that end it, by the keys of files that name them.
_FILLED_IN: Final = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}

# Those that only mark its parts.
_PARTS: Final = frozenset(
    (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
        "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>",
        "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>",
        "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    )
)  # fmt: skip


# The ids of special tokens where a file does not say, by the kind of its tokenizer.
_DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
}


class Vocabulary:
    """What a file says of its tokenizer, in order.

    Args:
        path: of the file
        metadata: what it says
    """

    def __init__(self, path: str, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        self.model: str = self._named("model")
        # Tokens without a text are known by their number.
        self.tokens = [
            token or f"[EMPTY_{number}]"
            for number, token in enumerate(self._array("tokens", str) or ())
        ]
        if not self.tokens:
            raise self.invalid("it has no tokens")
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(
                token for number, token in enumerate(self.tokens) if self.ids[token] != number
            )
            raise self.invalid(f"the token {twice!r} is there twice")
        self.types = self._types()

    def _named(self, key: str, default: str | None = None) -> str:
        found = self._metadata.get(PREFIX + key, default)
        if not isinstance(found, str):
            raise self.invalid(f"it has no `{PREFIX}{key}`")
        return found

    def _array(self, key: str, of: type | tuple[type, ...]) -> Sequence[Any] | None:
        found = self._metadata.get(PREFIX + key)
        if found is None:
            return None
        if not _is_array(found, of):
            raise self.invalid(f"its `{PREFIX}{key}` are not what they should be")
        array: Sequence[Any] = found
        return array

    def _of_each_token(self, key: str) -> Sequence[Any] | None:
        found = self._array(key, (int, float))
        if found is None:
            return None
        if len(found) < len(self.tokens):
            raise self.invalid(f"it has {len(self.tokens)} tokens and {len(found)} `{PREFIX}{key}`")
        return found[: len(self.tokens)]

    def _types(self) -> list[int]:
        found = self._of_each_token("token_type")
        types = [Type.NORMAL] * len(self.tokens) if found is None else list(found)
        for name in _ENDS | _PARTS | {name for names in _FILLED_IN.values() for name in names}:
            if (number := self.ids.get(name)) is not None:
                types[number] = Type.CONTROL
        return types

    @property
    def scores(self) -> Sequence[float]:
        """Of each token.

        Raises:
            BridgeError: ``invalid_checkpoint`` where there are none
        """
        found = self._of_each_token("scores")
        if found is None:
            raise self.invalid(f"it has no `{PREFIX}scores`, which tell how its tokens are joined")
        return found

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs of tokens that are joined, in order.

        Raises:
            BridgeError: ``invalid_checkpoint`` where there are none, or some of what is no token
        """
        found = self._array("merges", str)
        if found is None:
            raise self.invalid(f"it has no `{PREFIX}merges`, which tell how its tokens are joined")
        pairs: dict[tuple[str, str], None] = {}
        for merge in found:
            # A token may begin with a space, and none is empty.
            end = merge.find(" ", 1)
            pair = (merge[:end], merge[end + 1 :])
            if end < 0 or any(piece not in self.ids for piece in (*pair, "".join(pair))):
                raise self.invalid(f"its merge {merge!r} is not of two tokens to a third")
            pairs.setdefault(pair)
        return list(pairs)

    def flag(self, key: str, default: bool) -> bool:
        found = self._metadata.get(PREFIX + key, default)
        return found if isinstance(found, bool) else default

    @property
    def pre_tokenizer(self) -> str:
        """What llama.cpp calls the way to cut words."""
        return self._named("pre", "default")

    @property
    def charsmap(self) -> bytes | None:
        """What SentencePiece replaces in a text, as it has it; None where that is nothing.

        Raises:
            BridgeError: ``invalid_checkpoint`` where it is not what it says
        """
        found = self._array("precompiled_charsmap", int)
        if found is None:
            return None
        charsmap = bytes(value & 0xFF for value in found)
        # A trie, after its length, and the texts that it leads to.
        length = int.from_bytes(charsmap[:4], "little")
        if len(charsmap) <= 4 + length or length % 4 or not length or charsmap[-1]:
            raise self.invalid(f"its `{PREFIX}precompiled_charsmap` is cut short")
        return charsmap

    def special(self, name: str) -> int | None:
        """The id of a special token, such as ``bos``; None where there is none.

        Raises:
            BridgeError: ``invalid_checkpoint`` for the id of no token
        """
        found = self._metadata.get(f"{PREFIX}{name}_token_id")
        if found is None:
            found = _DEFAULTS.get(self.model, {}).get(name)
            return found if found is not None and found < len(self.tokens) else None
        if not isinstance(found, int) or not 0 <= found < len(self.tokens):
            raise self.invalid(
                f"its `{PREFIX}{name}_token_id` is {found!r}, and it has {len(self.tokens)} tokens"
            )
        return found

    @property
    def context_length(self) -> int | None:
        architecture = self._metadata.get("general.architecture")
        found = self._metadata.get(f"{architecture}.context_length")
        return found if isinstance(found, int) else None

    @property
    def strips_after_special(self) -> bool:
        """Whether the spaces after special tokens go with them: so it is with Phi-3, which files
        do not say otherwise."""
        name = self._metadata.get("general.name")
        return isinstance(name, str) and any(each in name.lower() for each in ("phi-3", "phi3"))

    def invalid(self, what: str) -> BridgeError:
        return BridgeError(
            "invalid_checkpoint",
            f"The tokenizer in `{self.path}` makes no sense: {what}.",
            {"file": self.path},
            remedy="Name the model's own by the option `tokenizer`: a folder or a name on the hub.",
        )


def ends(metadata: Mapping[str, Any]) -> list[int]:
    """The ids of all tokens at which llama.cpp ends an answer. None for tokens that make no sense:
    whoever needs a ``Vocabulary`` is told."""
    tokens = metadata.get(f"{PREFIX}tokens", ())
    ids = {token: number for number, token in enumerate(tokens if _is_array(tokens, str) else ())}

    def named(key: str) -> set[int]:
        found = metadata.get(PREFIX + key)
        return {found} if isinstance(found, int) and 0 <= found < len(ids) else set()

    found = {ids[token] for token in _ENDS & ids.keys()}
    for key in ("eos_token_id", "eot_token_id", "eom_token_id"):
        found |= named(key)
    for key, names in _FILLED_IN.items():
        found |= named(key) or {ids[name] for name in names if name in ids}
    # Where other tokens end an answer, these two end a part of it.
    if {"<|return|>", "<|call|>"} <= ids.keys() or (
        "<|flush|>" in ids and ("<|call|>" in ids or "<|calls|>" in ids)
    ):
        found.discard(ids.get("<|end|>", -1))
    if "<|tool_response>" in ids:
        found.discard(ids.get("</s>", -1))
    return sorted(found)


def _is_array(value: Any, of: type | tuple[type, ...]) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(each, of) for each in value)
    )
