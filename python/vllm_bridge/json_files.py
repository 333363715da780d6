"""JSON of files that anybody may have written."""

import json
from collections.abc import Mapping
from typing import Any

from vllm_bridge.errors import BridgeError


def read(path: str) -> dict[str, Any]:
    """The object in a file.

    Raises:
        OSError: if it cannot be read
        ValueError: if it is no JSON object
    """
    with open(path, encoding="utf-8") as file:
        found = parse(file.read())
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def read_or_refuse(
    path: str, reason: str, details: Mapping[str, Any], remedy: str
) -> dict[str, Any]:
    """The object in a file that there is no going on without.

    Raises:
        BridgeError: of these, where it cannot be read or is no JSON object
    """
    try:
        return read(path)
    except (OSError, ValueError) as error:
        what = f"`{path}` cannot be read: {error}."
        raise BridgeError(reason, what, dict(details), remedy) from error


def parse(text: str | bytes) -> Any:
    """
    Raises:
        ValueError: if it is no JSON
    """
    try:
        return json.loads(text)
    except RecursionError:
        # A few kilobytes of brackets are enough for it.
        raise ValueError("it is nested too deeply") from None
