"""Repositories of the hub that have a model in another format."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm_bridge.advice.ranking import Way
from vllm_bridge.advice.rules import Rules
from vllm_bridge.hub.search import Found, search

# That many are asked for, those with the most downloads first; one is offered of each format.
_LIMIT: Final = 100

_EIGHT: Final = ("int8", "8bit", "8-bit", "w8a16", "q8")


def ways(base: str, options: Mapping[str, Any], rules: Rules) -> dict[str, Way]:
    """The most downloaded repository of each format, by the names of the formats.

    Args:
        base: the plain model, as the hub calls it

    Raises:
        BridgeError: see ``search``
    """
    filters = [f"base_model:quantized:{base}"]
    found: dict[str, Way] = {}
    for repository in search("", _LIMIT, filters=filters, options=options):
        for name in formats(repository, rules):
            found.setdefault(name, _way(repository, name))
    return found


def formats(repository: Found, rules: Rules) -> Sequence[str]:
    """What the rules call the formats of a repository, by its tags and its name."""
    words, method = repository.id.lower(), repository.method
    if method is None:
        return ()
    if method == "gguf":
        return [name for name in rules.formats if name.startswith("gguf")]
    if method == "compressed-tensors":
        scheme = "W8A8" if "w8a8" in words else "FP8" if "fp8" in words else "W4A16"
        return [f"compressed-tensors ({scheme})"]
    if method in rules.formats:
        return [method]
    bits = next((bits for bits in (2, 3) if f"{bits}bit" in words or f"int{bits}" in words), 4)
    bits = 8 if any(word in words for word in _EIGHT) else bits
    name = f"{method} ({bits} bits)"
    return [name] if name in rules.formats else ()


def _way(repository: Found, name: str) -> Way:
    model = repository.id
    if repository.method == "gguf":
        model += ":" + name.partition("(")[2].rstrip(")")
    gated = ", whose owner must let you" if repository.gated else ""
    file = ", if that file is there" if repository.method == "gguf" else ""
    return Way("hub", model, {}, f'load "{model}"{file}{gated}')
