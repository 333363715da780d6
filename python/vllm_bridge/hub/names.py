"""How users name models of the hub."""

import re
from typing import Final, NamedTuple

_ID = r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?"
_FILE = r"[\w.-][\w./ -]*\.gguf"

# `OWNER/NAME`, with `:Q4_K_M` or `:FILE.gguf` for one GGUF file of it, which llama.cpp and others
# also write as `OWNER/NAME/FILE.gguf`.
_NAME: Final = re.compile(
    rf"(?P<id>{_ID})(?::(?P<file>{_FILE})|:(?P<variant>[\w.-]+))?", re.ASCII | re.IGNORECASE
)
_PATH: Final = re.compile(
    rf"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(?P<file>{_FILE})", re.ASCII | re.IGNORECASE
)


class Name(NamedTuple):
    """A model of the hub, as it was named.

    Args:
        id: of the repository: ``owner/name``, or ``name`` for one without an owner
        file: the GGUF file that is meant, by its path in the repository
        variant: the quantization of the GGUF file that is meant, such as ``Q8_0``
    """

    id: str
    file: str | None = None
    variant: str | None = None


def parse(model: str) -> Name | None:
    """What a name of a model means on the hub; None for what can be none there, as a path.

    Whether there is such a folder or file here is for the caller to look at first: a path that is
    there always wins.
    """
    # A GGUF file without a repository is one that should be here.
    if "/" not in model and model.lower().endswith(".gguf") and ":" not in model:
        return None
    match = _NAME.fullmatch(model) or _PATH.fullmatch(model)
    if match is None:
        return None
    parts = match.groupdict()
    if any(part in (".", "..") for part in (parts["file"] or "").split("/")):
        return None
    return Name(parts["id"], parts["file"], parts.get("variant"))
