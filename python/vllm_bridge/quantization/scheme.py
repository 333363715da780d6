"""What a ``quantization_config`` says, in the same words for all methods. Imports neither torch nor
vLLM, and takes configs as they stand in the wild: what is not of its kind is as if it was not
there.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# What is the same by several names, the usual one first.
_BITS = ("bits", "w_bit", "wbits", "weight_bits", "nbits")
_GROUP = ("group_size", "q_group_size", "weight_group_size")
_SYMMETRIC = ("sym", "symmetric")
_IGNORED = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "exclude_modules",
    "exclude",
    "skip_modules",
    "llm_int8_skip_modules",
)

# More than this no number of a config means.
_MOST = 2**53

# Names of libraries as they write them.
_TITLES = {
    "gptqmodel": "GPTQModel",
    "auto_gptq": "AutoGPTQ",
    "auto-gptq": "AutoGPTQ",
    "autogptq": "AutoGPTQ",
    "optimum": "Optimum",
    "intel/auto-round": "AutoRound",
    "auto-round": "AutoRound",
    "modelopt": "ModelOpt",
}


class Scheme(NamedTuple):
    """How weights are quantized.

    Args:
        format: how they are stored, in the method's words: ``gptq_v2``, ``pack-quantized``, ``nf4``
        bits: of each weight, without its part of the scales; those of most where they differ
        group_size: how many weights share a scale, -1 for a whole row or column; of blocks the
            length of a side
        strategy: what has a scale: ``group``, ``channel``, ``block`` or ``tensor``
        symmetric: whether zero is in the middle, so that there are no zero points
        desc_act: whether inputs are in the order of their activations
        activation_bits: where activations are quantized too
        activations: ``static`` scales, or ``dynamic`` ones
        kv_cache: what the KV cache is meant to be quantized to
        ignored: names, or patterns of names, of layers that are left as they are
        producer: what made it, with its version
    """

    format: str | None = None
    bits: float | None = None
    group_size: int | None = None
    strategy: str | None = None
    symmetric: bool | None = None
    desc_act: bool | None = None
    activation_bits: int | None = None
    activations: str | None = None
    kv_cache: str | None = None
    ignored: tuple[str, ...] = ()
    producer: str | None = None


def usual(config: Mapping[str, Any]) -> Scheme:
    """What most configs say in the same way."""
    group = integer(config, *_GROUP)
    zero_point = boolean(config, "zero_point")
    symmetric = boolean(config, *_SYMMETRIC)
    ignored = [name for key in _IGNORED for name in names(config.get(key))]
    if boolean(config, "lm_head") is False:
        ignored.append("lm_head")
    return Scheme(
        bits=number(config, *_BITS),
        group_size=group,
        strategy=None if group is None else "group" if group > 0 else "channel",
        symmetric=symmetric if zero_point is None else not zero_point,
        desc_act=boolean(config, "desc_act"),
        ignored=tuple(dict.fromkeys(ignored)),
        producer=producer(config),
    )


def producer(config: Mapping[str, Any]) -> str | None:
    """What made a checkpoint, as far as it signs what it makes."""
    meta = mapping(config, "meta")
    signed = meta.get("quantizer") or config.get("quantizer")
    if isinstance(signed, list | tuple):
        signed = next(iter(signed), None)
    if isinstance(signed, str):
        signer, _, version = signed.partition(":")
        return made_by(_TITLES.get(signer.lower(), signer), version)
    maker = mapping(config, "producer")
    named = text(maker, "name")
    if named is not None:
        return made_by(_TITLES.get(named.lower(), named), maker.get("version"))
    if "autoround_version" in config:
        return made_by("AutoRound", config["autoround_version"])
    return None


def cache(kv_cache_scheme: Mapping[str, Any]) -> str | None:
    """What compressed-tensors' scheme for the KV cache has it quantized to: ``fp8``, ``int8``."""
    bits, kind = number(kv_cache_scheme, "num_bits"), text(kv_cache_scheme, "type")
    return f"{'fp' if kind == 'float' else 'int'}{bits}" if bits else None


def made_by(name: str, version: Any = None) -> str:
    """A library's name, with its version where there is one."""
    return f"{name} {version}" if isinstance(version, str) and version else name


def number(config: Mapping[str, Any], *keys: str) -> float | None:
    """The first value of these keys that is a number; a whole one as such."""
    for key in keys:
        value = config.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if -_MOST <= value <= _MOST:  # which NaN is not
            return value
    return None


def integer(config: Mapping[str, Any], *keys: str) -> int | None:
    found = number(config, *keys)
    return found if isinstance(found, int) else None


def boolean(config: Mapping[str, Any], *keys: str) -> bool | None:
    found = (config[key] for key in keys if isinstance(config.get(key), bool))
    return next(found, None)


def text(config: Mapping[str, Any], *keys: str) -> str | None:
    found = (config[key] for key in keys if isinstance(config.get(key), str) and config[key])
    return next(found, None)


def mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def side(config: Mapping[str, Any], key: str) -> int | None:
    """The length of the first side of blocks of weights."""
    found = config.get(key)
    first = found[0] if isinstance(found, list | tuple) and found else None
    return first if isinstance(first, int) else None


def names(value: Any) -> tuple[str, ...]:
    """The strings of a list; none for what is no list."""
    found = value if isinstance(value, list | tuple) else ()
    return tuple(name for name in found if isinstance(name, str))


def digits(name: str) -> int | None:
    """The bits that a type's name tells: 4 of ``Q4_K``, 8 of ``F8_E4M3``."""
    found = re.search(r"\d+", name)
    return int(found[0]) if found else None


def most(values: Iterable[float | None]) -> float | None:
    """The most frequent of them, the first one of several."""
    there = [value for value in values if value is not None]
    return max(there, key=there.count) if there else None
