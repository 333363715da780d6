"""What is known of a name."""

import os
import re
from typing import Any, Final, Literal

import msgspec

from vllm_bridge.errors import BridgeError

# The name that stands for what was quantized in place, each with a label.
IN_PLACE: Final = "isq"

_WORD: Final = re.compile(r"[A-Za-z0-9][\w.+-]{0,95}", re.ASCII)


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model or an adapter with a name.

    Args:
        name: the part of its name that it shares with other outputs of the same job
        label: what tells it from those: ``Q4_K_M``; None where there is no need
        path: of its folder or its GGUF file
        registered_at: in seconds since 1970
        size: of its files, in bytes
        method: by which it is quantized, vLLM's name; None for a plain model
        bits: of each quantized weight
        base_model: what an adapter belongs to, and what a model was made of as far as it says so
        source: what it was made of here: a name on the hub, or a path
        revision: the commit or the fingerprint of that
        quality: how it compares with its source, a row of ``compare``
        made: how: ``by``, ``at``, ``job``, ``options``, ``libraries``, ``calibration``, …
    """

    name: str
    path: str
    kind: Literal["model", "adapter"]
    registered_at: float
    label: str | None = None
    size: int = 0
    method: str | None = None
    bits: int | float | None = None
    base_model: str | None = None
    source: str | None = None
    revision: str | None = None
    quality: dict[str, Any] | None = None
    made: dict[str, Any] | None = None

    @property
    def full_name(self) -> str:
        return self.name if self.label is None else f"{self.name}:{self.label}"

    @property
    def is_missing(self) -> bool:
        """Whether its files went away behind our back."""
        return not os.path.exists(self.path)


class Names(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a file of the registry holds: the outputs of a name, or what the name stands for.

    Args:
        alias_of: another name of the registry, or one of the hub
    """

    name: str
    outputs: list[Entry] = []
    alias_of: str | None = None


def parse(model: str) -> tuple[str, str | None] | None:
    """A name and its label; None for what can be no name here, as a path or ``owner/name``."""
    name, colon, label = model.partition(":")
    if _WORD.fullmatch(name) and (_WORD.fullmatch(label) if colon else True):
        return name, label or None
    return None


def check_word(word: str, option: str) -> None:
    """
    Raises:
        BridgeError: ``invalid_option`` for what can be no name, and no label
    """
    if option == "name" and word == IN_PLACE:
        raise BridgeError(
            "invalid_option",
            f"`{word}` is the name of what was quantized in place.",
            {"option": option, "value": word},
            remedy="Take another name.",
        )
    if not _WORD.fullmatch(word):
        raise BridgeError(
            "invalid_option",
            f"`{word}` can be no {option} of a model here.",
            {"option": option, "value": word},
            remedy="Take up to 96 letters, digits, `_`, `-`, `+` and `.`, the first a letter or a "
            "digit.",
        )
