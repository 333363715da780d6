"""The params of questions about a model, which are what an engine would be started with."""

from typing import Any

import msgspec


class ModelParams(msgspec.Struct, forbid_unknown_fields=True):
    """A model and the options of an engine, as the user gave them."""

    model: str
    options: dict[str, Any] = {}
