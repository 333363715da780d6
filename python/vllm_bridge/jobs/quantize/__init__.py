"""Quantizing a model: one output in one format, made by the producer of the format."""

import asyncio
import os
import resource
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_bridge.errors import BridgeError, map_exceptions
from vllm_bridge.jobs import task
from vllm_bridge.jobs.quantize import calibration
from vllm_bridge.jobs.quantize.calibration import MAX_LENGTH, MAX_SAMPLES, Calibration, read
from vllm_bridge.rpc.call import Call
from vllm_bridge.rpc.table import NoParams

if TYPE_CHECKING:
    from vllm_bridge.jobs.quantize.formats import Output

# A format, with its options by their names or a word for them.
Asked = tuple[str, dict[str, Any] | str | None]


class FormatsParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``quantize_formats``; see guides/protocol.md."""

    outputs: list[Asked]
    source: str | None = None
    calibration: Calibration | None = None
    max_samples: int = MAX_SAMPLES
    max_length: int = MAX_LENGTH


class QuantizeParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``quantize``; see guides/protocol.md."""

    source: str
    format: str
    out: str
    options: dict[str, Any] | str | None = None
    calibration: Calibration | None = None
    max_samples: int = MAX_SAMPLES
    max_length: int = MAX_LENGTH
    work: str | None = None


async def quantize_formats(_call: Call, params: FormatsParams) -> list[dict[str, Any]]:
    """Checks what a job is to make, and says what each output will be called and how many tokens
    it reads."""
    return await asyncio.to_thread(check, params)


async def quantize_options(_call: Call, _params: NoParams) -> list[dict[str, Any]]:
    """What models can be made in, with the options of each."""
    from vllm_bridge.jobs.quantize import formats

    return await asyncio.to_thread(formats.described)


def check(params: FormatsParams) -> list[dict[str, Any]]:
    """What ``quantize_formats`` does."""
    from vllm_bridge.jobs.quantize import formats
    from vllm_bridge.jobs.quantize.producer import Source

    source = None if params.source is None else Source(params.source)
    found = formats.outputs(params.outputs, source, params.calibration)
    reads = [_reads(one, params.calibration) for one in found]
    tokens = 0
    if any(reads):
        tokens = calibration.count(
            params.calibration or Calibration(),
            None if source is None else source.path,
            params.max_samples,
            params.max_length,
        )
    return [
        one.to_wire() | {"tokens": tokens if is_read else 0}
        for one, is_read in zip(found, reads, strict=True)
    ]


def _reads(one: "Output", given: Calibration | None) -> bool:
    """Whether an output takes calibration texts: what must have some has a set that ships."""
    return one.texts == "required" or (one.texts == "optional" and given is not None)


async def quantize(call: Call, params: QuantizeParams) -> dict[str, Any]:
    """Makes one output in a folder, and tells how far it is."""
    return await task.run(call, lambda tell: make(params, tell))


def make(params: QuantizeParams, tell: Callable[..., None]) -> dict[str, Any]:
    """What ``quantize`` does.

    Raises:
        BridgeError: what is wrong, or went wrong; then there is no folder
    """
    from vllm_bridge.jobs.quantize import formats
    from vllm_bridge.jobs.quantize.producer import Source

    started = time.monotonic()
    tell("preparing")
    source = Source(params.source, params.work)
    asked = (params.format, params.options)
    (one,) = formats.outputs([asked], source)
    texts = None
    if _reads(one, params.calibration):
        given = params.calibration or Calibration()
        texts = read(given, source.path, params.max_samples, params.max_length)
    os.makedirs(params.out)
    try:
        with map_exceptions(lambda error: _error(error, one, source)), task.told_apart():
            made = one.producer.make(source, one.options, texts, params.out, tell)
            tell("writing")
            files = _written(params.out)
    except BaseException:
        # What has come of it is no model.
        shutil.rmtree(params.out, ignore_errors=True)
        raise
    return {
        "format": one.producer.NAME,
        "label": one.label,
        "options": dict(made.options),
        "libraries": dict(made.libraries),
        "calibration": None if texts is None else texts.to_wire(),
        "notes": list(made.notes),
        "files": files,
        "bytes": sum(files.values()),
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _written(folder: str) -> dict[str, int]:
    """The files of an output with their sizes, once they are on the disk."""
    sizes = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                sizes[os.path.relpath(path, folder)] = os.fstat(file.fileno()).st_size
    return dict(sorted(sizes.items()))


def _error(error: Exception, one: "Output", source: Any) -> BridgeError:
    what = f"{type(error).__name__}: {error}"
    return BridgeError(
        "unsupported",
        f"`{source.path}` could not be quantized to {one.label}: {what}",
        {"format": one.producer.NAME, "label": one.label, "exception": what},
        remedy="The log has the rest. Other options, or another format, may do.",
    )


METHODS: dict[str, Any] = {
    "quantize_options": (NoParams, quantize_options),
    "quantize_formats": (FormatsParams, quantize_formats),
    "quantize": (QuantizeParams, quantize),
}
