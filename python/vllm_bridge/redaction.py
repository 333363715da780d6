"""What may be secret among what callers give, and how errors are kept from telling it."""

import os
import re
from typing import Any, Final

# The names of what may be secret; the same as in lib/vllm/secrets.ex, and a test compares the two.
NAMES: Final = (
    r"token$|secret|passw|passphrase|credential|authorization|bearer|cookie"
    r"|(api|access|private|auth|signing|encryption)[_.-]?keys?$"
    r"|^(auth|pwd|pass|env)$|[_.-](auth|pwd|pass)$"
)
HIDDEN: Final = "[redacted]"

_NAME = re.compile(NAMES, re.IGNORECASE)
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
# Tokens of the hub, and of headers.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )[\w.~+/=-]+")
# What pydantic shows of a value that it refuses, cut off in its middle.
_INPUT = re.compile(r"(?<=input_value=).*?(?=, input_type=)", re.DOTALL)
# In what Python and JSON write of values: 'name': …, "name": …, name=…
_KEY = re.compile(r"""(?:(?P<quote>['"])(?P<quoted>[\w.-]+)(?P=quote)\s*:|\b(?P<bare>\w+)=)\s*""")
_STRING = r"""'(?:[^'\\]|\\.)*(?:'|$)|"(?:[^"\\]|\\.)*(?:"|$)"""
_VALUE = re.compile(rf"{_STRING}|[^\s,;)\]}}]+", re.DOTALL)
_PIECE = re.compile(rf"{_STRING}|[()\[\]{{}}]", re.DOTALL)


def is_secret(name: str) -> bool:
    """Whether a value of this name may be a secret."""
    return _NAME.search(name) is not None


def redact(text: str) -> str:
    """``text`` without access tokens, and without the values that stand in it by a name that may
    be a secret's."""
    for variable in _VARIABLES:
        if secret := os.environ.get(variable):
            text = text.replace(secret, HIDDEN)
    text = _INPUT.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))
    kept, at = [], 0
    for key in _KEY.finditer(text):
        if key.start() >= at and is_secret(key["quoted"] or key["bare"]):
            kept += [text[at : key.end()], HIDDEN]
            at = _end_of_value(text, key.end())
    return "".join([*kept, text[at:]])


def redact_all(value: Any) -> Any:
    """``value`` with everything in it redacted and everything that is not plain data as its
    ``repr``, so that it can always be encoded."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return redact(value)
        case dict():
            return {
                redact(str(key)): HIDDEN if is_secret(str(key)) else redact_all(item)
                for key, item in value.items()
            }
        case list() | tuple() | set() | frozenset():
            return [redact_all(item) for item in value]
        case _:
            return redact(repr(value))


def _end_of_value(text: str, start: int) -> int:
    if text[start : start + 1] not in ("(", "[", "{"):
        value = _VALUE.match(text, start)
        return value.end() if value else start
    depth = 0
    for piece in _PIECE.finditer(text, start):
        depth += (piece[0] in "([{") - (piece[0] in ")]}")
        if depth == 0:
            return piece.end()
    return len(text)  # it was cut off
