"""The settings of HQQ's layers, as configs have them. Imports neither torch nor vLLM."""

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# What each number of bits is packed as, and how many integers that holds of a column.
PACKINGS = {
    8: ("8bit_u8", 1), 6: ("8bit_u8", 1), 5: ("8bit_u8", 1), 4: ("4bit_u8", 2), 3: ("3bit_32", 10),
    2: ("2bit_u8", 4), 1.58: ("2bit_u8", 4), 1: ("1bit_u8", 8),
}  # fmt: skip

# The parts of a layer's name that do not tell it from those of other blocks.
_BLOCK = re.compile(r"(?:^|\.)(?:model|layers|\d+)(?=\.|$)")


class Settings(NamedTuple):
    """How a layer is quantized; the names are hqq's own, and so are the defaults.

    Args:
        nbits: of an integer; 1.58 for three values
        group_size: how many weights share a scale; None for as many as a row, or a column, has
        axis: 1 where the weights of a group follow each other in the matrix as it lies in memory,
            0 where they are as far from each other as they can be
    """

    nbits: float = 4
    group_size: int | None = 64
    axis: int = 1

    @property
    def bits(self) -> int:
        return math.ceil(self.nbits)

    def group(self, rows: int, columns: int) -> int:
        """How many weights of a matrix share a scale.

        Raises:
            ValueError: where the matrix has no whole groups
        """
        group = self.group_size or (columns if self.axis == 1 else rows)
        if rows < 1 or columns < 1 or rows * columns % group:
            raise ValueError(f"{rows} x {columns} weights are no whole groups of {group}")
        return group


class Layers(NamedTuple):
    """Which layers are quantized, and how.

    Args:
        default: all but those that are told; None where only those are
        named: by their whole name, or by the part that they share in all blocks of a model
        skipped: names, or parts of names, of layers that are left as they are
    """

    default: Settings | None
    named: Mapping[str, Settings]
    skipped: tuple[str, ...]

    def of(self, name: str) -> Settings | None:
        """The settings of a layer; None for one that is left as it is."""
        parts = name.split(".")
        if any(skipped == name or skipped in parts for skipped in self.skipped):
            return None
        if name in self.named:
            return self.named[name]
        short = shared_name(name)
        for other, settings in self.named.items():
            if short == other or short.endswith(f".{other}"):
                return settings
        return self.default


def shared_name(name: str) -> str:
    """The part of a layer's name that is the same in all blocks: ``self_attn.q_proj``."""
    return _BLOCK.sub("", name).lstrip(".")


def layers(config: Mapping[str, Any]) -> Layers:
    """What a ``quantization_config`` says, which is one set of settings, or one for each kind of
    layer.

    Raises:
        ValueError: what is wrong with it
    """
    found = config.get("quant_config")
    if not isinstance(found, Mapping):
        raise ValueError("it has no `quant_config`")
    skipped = config.get("skip_modules") or ()
    if not _are_strings(skipped):
        raise ValueError("`skip_modules` is a list of names")
    if "weight_quant_params" in found:
        return Layers(_settings(found), {}, tuple(skipped))
    # What is not named is left as it is, and so is what is named without settings.
    named = {name: _settings(one) for name, one in found.items() if one is not None}
    return Layers(None, named, tuple(skipped))


def settings(given: Mapping[str, Any]) -> Settings:
    """Settings by their names.

    Raises:
        ValueError: what is wrong with them
    """
    made = Settings(**{name: given[name] for name in Settings._fields if name in given})
    for name, value in made._asdict().items():
        if isinstance(value, bool):
            raise ValueError(f"`{name}` is a truth value, not a number")
    if not isinstance(made.nbits, int | float) or made.nbits not in PACKINGS:
        raise ValueError(f"`nbits` is {reprlib.repr(made.nbits)}, not one of {_listed(PACKINGS)}")
    group = made.group_size
    if not (group is None or (isinstance(group, int) and group > 0)):
        raise ValueError(f"`group_size` is {reprlib.repr(group)}, not a number of weights")
    if made.axis not in (0, 1):
        raise ValueError(f"`axis` is {reprlib.repr(made.axis)}, not 0 or 1")
    return made


def config(named: Mapping[str, Settings] | Settings, skipped: Iterable[str] = ()) -> dict[str, Any]:
    """The ``quantization_config`` that says so."""
    quant_config = (
        _config(named)
        if isinstance(named, Settings)
        else {name: _config(one) for name, one in named.items()}
    )
    return {"quant_method": "hqq", "quant_config": quant_config, "skip_modules": list(skipped)}


def _config(one: Settings) -> dict[str, Any]:
    return {"weight_quant_params": one._asdict()}


def _settings(found: Any) -> Settings:
    parameters = found.get("weight_quant_params") if isinstance(found, Mapping) else None
    if not isinstance(parameters, Mapping):
        raise ValueError("it has no `weight_quant_params`")
    return settings(parameters)


def _are_strings(names: Any) -> bool:
    return not isinstance(names, str) and all(isinstance(name, str) for name in names)


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(map(str, sorted(numbers)))
