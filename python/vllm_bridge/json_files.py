"""JSON of files that anybody may have written."""

import json
from typing import Any


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
