"""What quantizing a model would take, before anything is made: disk, memory and time, for each
output. Imports no torch.

Sizes of files follow from the shapes of the tensors and what each format stores. Peaks of memory
are the libraries, what a producer holds of the model at a time, and what it computes with; time is
counted as ``jobs.foreseen`` does. bench/job_sizes.py holds all of them against what jobs took.
"""

import fnmatch
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import usual
from vllm_bridge.jobs.foreseen import Foreseen, Machine
from vllm_bridge.quantization.hqq.settings import PACKINGS
from vllm_bridge.sizing import formats, layers, parts
from vllm_bridge.sizing.parts import Part
from vllm_bridge.sizing.settings import ITEMSIZES

_MIB: Final = 2**20

# Seconds for a billion weights, by what is done with them: a GGUF file between is written; types of
# GGUF are found; linear layers are rounded, each for itself.
_CONVERTING: Final = 8.0
_GGUF: Final = {"IQ": 350.0, "K": 65.0, "": 6.0}
_ROUNDING: Final = {"nf4": 30.0, "int8": 8.0, "hqq": 220.0, "torchao": 8.0, "rtn": 10.0}

# For a billion products of a weight and a token; texts are read twice, as they are and as they are
# after each layer was quantized.
_PRODUCTS: Final = 0.02

# GPTQ goes through a matrix column by column, and inverts the Hessian of its columns: seconds for a
# column, for a billion weights, and for a billion of the cubes of the columns' numbers.
_COLUMN: Final = 1e-4
_WEIGHTS: Final = 160.0
_CUBES: Final = 0.03


class _Producing(NamedTuple):
    """What a way of quantizing takes.

    Args:
        start: seconds to import its libraries
        libraries: bytes of them
        again: how often what is quantized is there once more as it was, beside the whole model
        largest: bytes for each weight of the largest matrix, or of GGUF's largest tensor
        square: bytes for each number of a matrix that is square and has as many columns as the
            widest; a Hessian is one
        slower: how much longer than GPTQ by llmcompressor it takes, where texts are read
    """

    start: float
    libraries: int
    again: float = 0.0
    largest: float = 0.0
    square: float = 0.0
    slower: float = 1.0


_PRODUCING: Final[Mapping[str, _Producing]] = {
    "gguf": _Producing(9, 405 * _MIB, largest=9.6),
    "bitsandbytes": _Producing(9, 405 * _MIB, largest=20),
    "hqq": _Producing(9, 440 * _MIB, largest=75),
    "torchao": _Producing(9, 405 * _MIB, again=0.3, largest=20),
    "rtn of 8": _Producing(11, 532 * _MIB, again=0.3),
    "rtn of 4": _Producing(11, 532 * _MIB, again=1.2),
    "calibrated": _Producing(11, 545 * _MIB, square=22),
    "gptq": _Producing(13, 675 * _MIB, square=31, slower=1.65),
    "awq": _Producing(13, 700 * _MIB, square=49, slower=3.0),
}

# What compressed-tensors stores of its schemes beside integers of so many bits: (bits, group,
# bits of a group). A group of 0 is a row.
_SCHEMES: Final[Mapping[str, tuple[int, int, int]]] = {
    "W8A16": (8, 128, 16), "W4A16": (4, 128, 16), "W4A16_ASYM": (4, 128, 20), "W4A8": (4, 128, 16),
    "W4AFP8": (4, 128, 16), "W8A8": (8, 0, 16), "INT8": (8, 0, 16), "FP8": (8, 0, 0),
    "FP8_DYNAMIC": (8, 0, 16), "FP8_BLOCK": (8, 128 * 128, 16), "NVFP4": (4, 16, 8),
    "NVFP4A16": (4, 16, 8), "MXFP4": (4, 32, 8), "MXFP4A16": (4, 32, 8), "MXFP8": (8, 32, 8),
    "MXFP8A16": (8, 32, 8),
}  # fmt: skip

# To measure a model: seconds to import vLLM, to start an engine, and to compare, give a place and a
# name; and for a billion weights, to load them and to read and say what is measured.
_MEASURING: Final = 15.0
_MEASURED: Final = 60.0

# The options that name what is left as it is.
_LEFT: Final = ("ignore", "llm_int8_skip_modules", "skip_modules", "modules_to_not_convert")

# What a layer of a matrix takes in files.
Layer = Callable[[int, int], float]


def of(
    checkpoint: Checkpoint,
    model: str,
    asked: Sequence[tuple[str, Mapping[str, Any], int]],
    machine: Machine,
) -> list[Foreseen]:
    """
    Args:
        model: as it was named
        asked: formats, each with all of its options and the tokens of calibration texts that it
            reads

    Raises:
        BridgeError: ``unsupported`` for what is quantized already or has no known tensors
    """
    kept = [part for part in parts.parts(checkpoint, {}) if part.kind != parts.NOT_KEPT]
    if checkpoint.quantization is not None or not kept:
        raise BridgeError(
            "unsupported",
            f"`{model}` is no plain model in safetensors, and only these are quantized.",
            {"model": model},
            remedy="Name the plain model that it was made of.",
        )
    return [_output(checkpoint, kept, *one, machine) for one in asked]


def usual_kl(form: str, options: Mapping[str, Any]) -> float | None:
    """The mean KL divergence that such an output usually has; None where none is known."""
    if form == "gguf":
        return usual.kl(f"gguf ({options.get('ftype', 'Q4_K_M')})", None)
    if form == "compressed-tensors":
        scheme = str(options.get("scheme", "W4A16"))
        bits = _scheme(options)[0]
        if "A16" in scheme:
            return usual.kl(form, bits)
        # Of activations with fewer bits than eight, and of both in few, nobody has published it.
        return usual.kl(form, bits, 8) if bits == 8 else None
    if form == "torchao":
        kind = str(options.get("quant_type")).lower()
        return usual.kl(form, 4 if "int4" in kind else 8, 8 if "dynamic" in kind else None)
    if form == "bitsandbytes":
        return usual.kl(form, 8 if options.get("load_in_8bit") else 4)
    return usual.kl(form, options.get("nbits" if form == "hqq" else "bits", 4))


def verification(checkpoint: Checkpoint, outputs: int, machine: Machine) -> tuple[float, float]:
    """The minutes to measure a model and each of so many outputs, and compare them with it."""
    kept = [part for part in parts.parts(checkpoint, {}) if part.kind != parts.NOT_KEPT]
    weights = sum(part.elements * part.alike for part in kept) / 1e9
    times = outputs + 1
    return machine.minutes(times * _MEASURING, times * weights * _MEASURED)


def _output(
    checkpoint: Checkpoint,
    kept: Sequence[Part],
    form: str,
    options: Mapping[str, Any],
    tokens: int,
    machine: Machine,
) -> Foreseen:
    if form == "gguf":
        return _gguf(checkpoint, kept, str(options.get("ftype", "Q4_K_M")), tokens, machine)
    left = [pattern for name in _LEFT for pattern in options.get(name) or ()]
    chosen = [
        part
        for part in kept
        if part.is_quantizable and not part.in_tower and not _is_left(part.name, left)
    ]
    layer = _layer(form, options)
    quantized = sum(
        math.ceil(layer(part.elements // (columns := part.tensor.shape[-1]), columns)) * part.alike
        for part in chosen
    )
    size = quantized + sum(_stored(part) for part in kept if part not in chosen)
    ways = _ways(form, options, tokens)
    columns = max((part.tensor.shape[-1] for part in chosen), default=0)
    hidden = layers.text_config(checkpoint.config).number("hidden_size")
    memory = max(
        way.libraries
        + sum(_stored(part) for part in kept)
        + way.again * sum(_stored(part) for part in chosen)
        + quantized
        + way.largest * max((part.elements for part in chosen), default=0)
        + way.square * columns * columns
        # What layers are given of the texts, and what they make of it.
        + 8 * hidden * tokens
        for way in ways
    )
    way = ways[0]
    serial, parallel = _seconds(form, options, chosen, tokens)
    files = size + _beside(checkpoint)
    minutes = machine.minutes(way.start + serial * way.slower, parallel * way.slower)
    return Foreseen(files, files, int(memory), minutes)


def _gguf(
    checkpoint: Checkpoint, kept: Sequence[Part], ftype: str, tokens: int, machine: Machine
) -> Foreseen:
    """A file in 16 bits is made first, and the other of it, one tensor after the other."""
    way = _PRODUCING["gguf"]
    weights = sum(part.elements * part.alike for part in kept)
    size = formats.gguf_bytes(checkpoint, ftype)
    is_plain = ftype in ("F32", "F16", "BF16")
    seconds = weights * (_CONVERTING + 2 * _PRODUCTS * tokens)
    if ftype.startswith("IQ"):
        seconds += weights * _GGUF["IQ"]
    elif not is_plain:
        types = formats.gguf_weights(checkpoint, ftype)
        seconds += sum(
            count * _GGUF["K" if name.endswith("_K") else ""] for name, count in types.items()
        )
    memory = way.libraries + way.largest * max(part.elements for part in kept)
    if tokens:  # the file between is read by llama.cpp
        memory = max(memory, way.libraries + 2 * weights)
    minutes = machine.minutes(way.start, seconds / 1e9)
    return Foreseen(size, size if is_plain else size + 2 * weights, int(memory), minutes)


def _ways(form: str, options: Mapping[str, Any], tokens: int) -> list[_Producing]:
    """What takes the time, and what else may take the most memory."""
    if form != "compressed-tensors":
        return [_PRODUCING[form]]
    bits = _scheme(options)[0]
    rounding = _PRODUCING["rtn of 8" if bits == 8 else "rtn of 4"]
    # However weights were found, they are packed and written in the same way.
    return [_PRODUCING["calibrated"], rounding] if tokens else [rounding]


def _seconds(
    form: str, options: Mapping[str, Any], chosen: Sequence[Part], tokens: int
) -> tuple[float, float]:
    """Of one core, and of several together, beside the imports."""
    weights = sum(part.elements * part.alike for part in chosen) / 1e9
    reading = 2 * _PRODUCTS * tokens * weights
    if not tokens or _is_rounded(form, options):
        kind = {"bitsandbytes": "nf4", "compressed-tensors": "rtn"}.get(form, form)
        if options.get("load_in_8bit"):
            kind = "int8"
        return 0.0, weights * _ROUNDING[kind] + reading
    columns = [part.tensor.shape[-1] for part in chosen for _ in range(part.alike)]
    cubes = sum(number**3 for number in columns) / 1e9
    return sum(columns) * _COLUMN, weights * _WEIGHTS + cubes * _CUBES + reading


def _layer(form: str, options: Mapping[str, Any]) -> Layer:
    if form in ("gptq", "awq"):
        bits, group = options.get("bits", 4), options.get("group_size", 128)
        order = 4 if form == "gptq" else 0

        def packed(rows: int, columns: int) -> float:
            groups = rows * math.ceil(columns / (group if group > 0 else columns))
            return float(rows * columns * bits / 8 + groups * (2 + bits / 8) + order * columns)

        return packed
    if form == "compressed-tensors":
        bits, size, of_group = _scheme(options)
        given = options.get("group_size")
        size = size if given is None else max(given, 0)

        def compressed(rows: int, columns: int) -> float:
            groups = rows * columns / size if size else rows
            return rows * columns * bits / 8 + groups * of_group / 8 + 16

        return compressed
    if form == "bitsandbytes":
        if options.get("load_in_8bit"):
            return lambda rows, columns: rows * columns + 4 * rows
        scale = 1 + 4 / 256 if options.get("bnb_4bit_use_double_quant") else 4
        return lambda rows, columns: rows * columns * (0.5 + scale / 64) + 160
    if form == "hqq":
        _, count = PACKINGS.get(options.get("nbits", 4), ("", 2))
        stored = {10: 4 / 10}.get(count, 1 / count)
        group = options.get("group_size", 64)
        return lambda rows, columns: rows * columns * (stored + 4 / group) + 2050
    kind = str(options.get("quant_type")).lower()
    if "int4" in kind:
        return lambda rows, columns: rows * columns * (0.5 + 4 / 128)
    return lambda rows, columns: rows * columns + 2 * rows


def _is_rounded(form: str, options: Mapping[str, Any]) -> bool:
    """Whether weights are rounded to the nearest, whatever the texts are read for."""
    if form != "compressed-tensors":
        return False
    scheme = str(options.get("scheme", "W4A16"))
    usual = "rtn" if _scheme(options)[0] == 8 or "FP" in scheme else "gptq"
    return (options.get("algorithm") or usual) == "rtn"


def _scheme(options: Mapping[str, Any]) -> tuple[int, int, int]:
    return _SCHEMES.get(str(options.get("scheme", "W4A16")), (8, 0, 16))


def _is_left(name: str, patterns: Sequence[str]) -> bool:
    """Whether a layer is left as it is: by its name, a part of it, or ``re:`` and a pattern."""
    layer = name.removesuffix(".weight")
    return any(
        re.match(one[3:], layer) is not None
        if one.startswith("re:")
        else f".{one}." in f".{layer}." or fnmatch.fnmatch(layer, one)
        for one in patterns
    )


def _stored(part: Part) -> int:
    return part.elements * part.alike * ITEMSIZES.get(_DTYPES.get(part.tensor.dtype, ""), 2)


# As headers of safetensors call them.
_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _beside(checkpoint: Checkpoint) -> int:
    """Of the tokenizer and what else goes with the weights."""
    folder = checkpoint.folder
    if folder is None or not os.path.isdir(folder):
        return 0
    return sum(
        entry.stat().st_size
        for entry in os.scandir(folder)
        if entry.is_file()
        and entry.name.endswith((".json", ".jinja", ".model", ".txt"))
        and not entry.name.endswith(".index.json")
    )
