"""What quantizing a model would take, before anything is made: disk, memory and time, for each
output and together. Imports no torch.

Sizes of files follow from the shapes of the tensors and what each format stores. Peaks of memory
are the libraries, what a producer holds of the model at a time, and what it computes with;
bench/job_sizes.py holds them against what jobs took.
"""

import dataclasses
import fnmatch
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from vllm_bridge.checkpoints import models
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization.hqq.settings import PACKINGS
from vllm_bridge.sizing import formats, parts
from vllm_bridge.sizing.parts import Part
from vllm_bridge.sizing.settings import ITEMSIZES

_MIB: Final = 2**20

# Of the libraries once they are imported, in bytes: what jobs took, less what is added below.
_LIBRARIES: Final = {
    "gguf": 285 * _MIB, "gptq": 650 * _MIB, "awq": 650 * _MIB, "compressed-tensors": 550 * _MIB,
    "bitsandbytes": 400 * _MIB, "hqq": 480 * _MIB, "torchao": 480 * _MIB,
}  # fmt: skip

# Seconds to import them and to check, and seconds for a billion weights on two cores of 2026, by
# bench/job_sizes.py. With texts: of a billion weights and a thousand tokens, too.
_START: Final = 8.0
_SECONDS: Final = {
    "gguf": 120.0, "gptq": 900.0, "awq": 1200.0, "compressed-tensors": 60.0, "bitsandbytes": 60.0,
    "hqq": 400.0, "torchao": 60.0,
}  # fmt: skip
_READING: Final = 30.0

# A machine may be as much faster, or slower because others use it too.
_FASTER, _SLOWER = 4.0, 4.0

# What compressed-tensors stores of its schemes beside integers of so many bits: (bits, group,
# bits of a group). A group of 0 is a row.
_SCHEMES: Final[Mapping[str, tuple[int, int, int]]] = {
    "W8A16": (8, 128, 16), "W4A16": (4, 128, 16), "W4A16_ASYM": (4, 128, 20), "W4A8": (4, 128, 16),
    "W4AFP8": (4, 128, 16), "W8A8": (8, 0, 16), "INT8": (8, 0, 16), "FP8": (8, 0, 0),
    "FP8_DYNAMIC": (8, 0, 16), "FP8_BLOCK": (8, 128 * 128, 16), "NVFP4": (4, 16, 8),
    "NVFP4A16": (4, 16, 8), "MXFP4": (4, 32, 8), "MXFP4A16": (4, 32, 8), "MXFP8": (8, 32, 8),
    "MXFP8A16": (8, 32, 8),
}  # fmt: skip

# The options that name what is left as it is.
_LEFT: Final = ("ignore", "llm_int8_skip_modules", "skip_modules", "modules_to_not_convert")

# What a layer of a matrix takes in files.
Layer = Callable[[int, int], float]


@dataclasses.dataclass(frozen=True)
class Foreseen:
    """What an output would take.

    Args:
        bytes: of its files
        disk: of its files, and of those that are there only while it is made
        memory: the most of it, in bytes
        minutes: from and to, without its verification
    """

    bytes: int
    disk: int
    memory: int
    minutes: tuple[float, float]

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def outputs(
    model: str,
    options: Mapping[str, Any],
    asked: Sequence[tuple[str, Mapping[str, Any]]],
    tokens: int,
) -> list[Foreseen]:
    """
    Args:
        options: of an engine, which say where the model is
        asked: formats, each with all of its options
        tokens: of the calibration texts

    Raises:
        BridgeError: ``unsupported`` for what is quantized already or has no known tensors
    """
    checkpoint = models.look_at(models.locate(model, options), options)
    kept = [part for part in parts.parts(checkpoint, {}) if part.kind != parts.NOT_KEPT]
    if checkpoint.quantization is not None or not kept:
        raise BridgeError(
            "unsupported",
            f"`{model}` is no plain model in safetensors, and only these are quantized.",
            {"model": model},
            remedy="Name the plain model that it was made of.",
        )
    return [_output(checkpoint, kept, form, given, tokens) for form, given in asked]


def together(each: Sequence[Foreseen]) -> Foreseen:
    """Of a job: outputs are made one after the other, and what is between them is kept until all
    are there."""
    if not each:
        return Foreseen(0, 0, 0, (0.0, 0.0))
    size = sum(one.bytes for one in each)
    return Foreseen(
        size,
        size + max(one.disk - one.bytes for one in each),
        max(one.memory for one in each),
        (sum(one.minutes[0] for one in each), sum(one.minutes[1] for one in each)),
    )


def _output(
    checkpoint: Checkpoint,
    kept: list[Part],
    form: str,
    options: Mapping[str, Any],
    tokens: int,
) -> Foreseen:
    tokens = tokens if _reads(form, options) else 0
    weights = sum(part.elements * part.alike for part in kept)
    plain = sum(_stored(part) for part in kept)
    if form == "gguf":
        ftype = str(options.get("ftype", "Q4_K_M"))
        between = 2 * weights
        size = formats.gguf_bytes(checkpoint, ftype)
        extra = 0 if ftype in ("F32", "F16", "BF16") else between
        # The file between is mapped while the matrices are quantized, one after the other.
        working: float = between + 8 * max(part.elements for part in kept)
    else:
        layer = _layer(form, options)
        left = [pattern for name in _LEFT for pattern in options.get(name) or ()]
        size, extra = 0, 0
        for part in kept:
            shape = part.tensor.shape
            if part.is_quantizable and not part.in_tower and not _is_left(part.name, left):
                columns = shape[-1]
                rows = part.elements // columns
                size += math.ceil(layer(rows, columns)) * part.alike
            else:
                size += _stored(part)
        working = _working(form, kept, plain, size, tokens)
    files = _beside(checkpoint) if form != "gguf" else 0
    seconds = _SECONDS.get(form, 600.0) * weights / 1e9
    seconds += _READING * tokens / 1e3 * weights / 1e9
    fast, slow = _START / 2 + seconds / _FASTER, 4 * _START + seconds * _SLOWER
    return Foreseen(
        size + files,
        size + files + extra,
        int(_LIBRARIES.get(form, 650 * _MIB) + working),
        (round(fast / 60, 2), round(slow / 60, 2)),
    )


def _working(form: str, kept: list[Part], plain: int, size: int, tokens: int) -> float:
    """The most that a producer holds beside its libraries."""
    largest = max(part.elements for part in kept)
    if form in ("bitsandbytes", "hqq", "torchao"):
        # A file of the source is mapped while what comes of it is put together and written.
        # HQQ looks for the best zero points of a layer with many copies of it in floats.
        return plain + 2 * size + (200 if form == "hqq" else 12) * largest
    if not tokens:
        return plain + size + 12 * largest
    columns = max(part.tensor.shape[-1] for part in kept if part.is_quantizable)
    # The model and what has come of it; a Hessian of floats for each matrix of a layer, which is
    # inverted; and what the layers are given of the texts.
    hidden = 8 * columns * min(tokens, 2048 * 256)
    return 2 * plain + size + 16 * columns * columns + hidden + 12 * largest


def _layer(form: str, options: Mapping[str, Any]) -> Layer:
    if form in ("gptq", "awq"):
        bits, group = options.get("bits", 4), options.get("group_size", 128)
        order = 4 if form == "gptq" else 0

        def packed(rows: int, columns: int) -> float:
            groups = rows * math.ceil(columns / (group if group > 0 else columns))
            return float(rows * columns * bits / 8 + groups * (2 + bits / 8) + order * columns)

        return packed
    if form == "compressed-tensors":
        bits, size, of_group = _SCHEMES.get(str(options.get("scheme", "W4A16")), (8, 0, 16))
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
        return lambda rows, columns: rows * columns * (stored + 4 / group) + 250
    kind = str(options.get("quant_type")).lower()
    if "int4" in kind:
        return lambda rows, columns: rows * columns * (0.5 + 4 / 128)
    return lambda rows, columns: rows * columns + 2 * rows


def _reads(form: str, options: Mapping[str, Any]) -> bool:
    """Whether the model reads the calibration texts. (For an importance matrix llama.cpp does, in
    little memory.)"""
    if form != "compressed-tensors":
        return form in ("gptq", "awq")
    scheme = str(options.get("scheme", "W4A16"))
    rounded = _SCHEMES.get(scheme, (8, 0, 0))[0] == 8 or "FP" in scheme
    algorithm = options.get("algorithm") or ("rtn" if rounded else "gptq")
    is_static = scheme in ("FP8", "NVFP4") or options.get("smoothing_strength") is not None
    return algorithm != "rtn" or is_static


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
