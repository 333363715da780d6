"""What a format usually loses, by ``usual.toml``."""

import dataclasses
import functools
import os
import tomllib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Usual:
    """What a quantized model may lose.

    Args:
        kl: mean KL divergence to the model in 16 bits, in nats, of the model that the source has
        of: what that is the figure of
        limit: what is still usual
        source: where the figure is from
        is_small: whether the model is so small that there is a wider margin
    """

    kl: float
    of: str
    limit: float
    source: str
    is_small: bool


@functools.cache
def _table() -> dict[str, Any]:
    with open(os.path.join(os.path.dirname(__file__), "usual.toml"), "rb") as file:
        return tomllib.load(file)


def of(figures: Mapping[str, Any]) -> Usual | None:
    """What a measured model may lose; None for one that is not quantized, and where nothing is
    known of its format."""
    table = _table()
    found = _figure(figures, table)
    if found is None:
        return None
    kl, named, source = found
    is_small = (figures["parameters"] or 0) < table["small"]["parameters"]
    margin = table["small"]["margin"] if is_small else table["margin"]
    return Usual(kl, named, kl * margin, table["sources"][source]["url"], is_small)


def kl(format: str, bits: float | None, activation_bits: int | None = None) -> float | None:
    """The mean KL divergence of what is not made yet, with its format as `compare` calls it; None
    where nothing is known."""
    figures = {"format": format, "bits": bits, "activation_bits": activation_bits}
    found = _figure(figures, _table())
    return found and found[0]


def _figure(figures: Mapping[str, Any], table: Mapping[str, Any]) -> tuple[float, str, str] | None:
    name, bits = figures["format"], figures["bits"]
    if name.startswith("gguf ("):
        type = name.removeprefix("gguf (").removesuffix(")")
        if type in table["gguf"]:
            return table["gguf"][type], type, "llama-cpp"
    if name == "plain" or bits is None:
        return None
    if figures["activation_bits"] is not None or name.startswith("fp8"):
        row = table["activations"]
        return row["kl"], row["of"], row["source"]
    # Those with fewer bits than any that is known lose as they please.
    row = next((row for row in table["bits"] if row["bits"] <= bits), None)
    return row and (row["kl"], row["of"], row["source"])


def instead(figures: Mapping[str, Any]) -> str:
    """What to try where a quantization is worse than usual."""
    hints: Mapping[str, str] = _table()["instead"]
    method = figures["format"].partition(" (")[0]
    return hints.get(method, hints["other"])
