"""JSON of files that anybody may have written."""

import json
from typing import Any


def read(path: str) -> Any:
    """What is in a file.

    Raises:
        OSError: if it cannot be read
        ValueError: if it is no JSON
    """
    with open(path, encoding="utf-8") as file:
        return parse(file.read())


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
