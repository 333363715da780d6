"""GGUF, by llama.cpp: its converter writes the model into a file in 16 bits, and its quantizer
makes the file of it that is asked for.

The file between them is kept for the other outputs of the job, and so is the importance matrix, in
the folder that the source names for that.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from vllm_bridge.checkpoints import gguf as headers
from vllm_bridge.checkpoints import gguf_model, gguf_names
from vllm_bridge.errors import BridgeError, unknown_name
from vllm_bridge.jobs.quantize.llama_cpp import converter, importance, quantizer
from vllm_bridge.jobs.quantize.producer import Made, Option, Source, Tell

if TYPE_CHECKING:
    from vllm_bridge.jobs.quantize.calibration import Texts
    from vllm_bridge.jobs.quantize.llama_cpp.quantizer import Importance

NAME = "gguf"

# The types that the converter writes itself, with what it calls them.
_PLAIN: Final = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

_TYPE_OPTIONS: Final = ("output_tensor_type", "token_embedding_type")

# What goes into a label beside the type of file, where it is not as usual.
_SAID: Final = {
    "pure": "pure",
    "quantize_output_tensor": "plain-output",
    "output_tensor_type": "output-{}",
    "token_embedding_type": "embd-{}",
    "tt_overrides": "mixed",
}

# Models of vLLM's own names for what GGUF calls something else.
_READ: Final = {*gguf_names.LAYERS, "mistral", "gemma3"}


def options() -> dict[str, Option]:
    """llama.cpp's own, and in which type its converter writes the file between."""
    found = {}
    for name, field in quantizer.fields().items():
        allowed: tuple[str, ...] = ()
        if name == "ftype":
            allowed = tuple(quantizer.file_types())
        elif name in _TYPE_OPTIONS:
            allowed = tuple(sorted(headers.READ))
        found[name] = Option(name, (field.type,), field.default, allowed, field.doc)
    found["outtype"] = Option(
        "outtype",
        (str,),
        "auto",
        tuple(converter.OUTTYPES),
        "the type of the file that is quantized; auto is the 16-bit type that the source is in",
    )
    return found


def presets() -> dict[str, dict[str, Any]]:
    """Each type of file by its name."""
    return {name: {"ftype": name} for name in quantizer.file_types()}


def texts(options: Mapping[str, Any]) -> Literal["unused", "optional", "required"]:
    """What the quantizer says to a toy with an importance matrix, and without one."""
    if options["ftype"] in _PLAIN:
        return "unused"
    without, weighted = (_tried(options, is_weighted) for is_weighted in (False, True))
    if without.error and not weighted.error:
        return "required"
    return "unused" if without.digest == weighted.digest else "optional"


def label(options: Mapping[str, Any]) -> str:
    """The type of file, and what else was chosen: ``Q4_K_M``, ``Q4_K_M-pure``."""
    defaults = {name: field.default for name, field in quantizer.fields().items()}
    words = [
        word.format(options[name])
        for name, word in _SAID.items()
        if options.get(name) not in (None, defaults.get(name))
    ]
    return "-".join([options["ftype"], *words])


def check(source: Source | None, options: Mapping[str, Any]) -> None:
    """Tries the options on a toy, and looks whether converter and engine know the model.

    Raises:
        BridgeError: ``invalid_option`` or ``unsupported``
    """
    _check_options(options)
    if source is not None:
        config = source.checkpoint.config
        converter.check(source.path, config)
        text = config.get("text_config") or config
        if text.get("model_type") not in _READ:
            raise BridgeError(
                "unsupported",
                f"Models of the type {text.get('model_type')} are not read from GGUF files here.",
                {"model": source.path, "allowed": sorted(_READ)},
                remedy="Choose another format than GGUF for this model.",
            )


def make(
    source: Source, options: Mapping[str, Any], texts: "Texts | None", out: str, tell: Tell
) -> Made:
    """Writes one file, ``model-<type>.gguf``."""
    ftype = options["ftype"]
    target = os.path.join(out, f"model-{ftype}.gguf")
    libraries = converter.libraries() | {"llama-cpp-python": quantizer.version()}
    shared = source.work or f"{out}.work"
    os.makedirs(shared, exist_ok=True)
    try:
        outtype = _PLAIN.get(ftype, options["outtype"])
        plain, notes = _converted(source, outtype, shared, tell)
        if source.takes_more_than_text:
            notes.append(
                "It is the part of the model that reads and writes text; what takes pictures or "
                "sound would be a file of its own (mmproj), which is not made here."
            )
        if ftype in _PLAIN:
            os.link(plain, target)
            used = {"ftype": ftype}
        else:
            matrix = None if texts is None else _importance(plain, texts, shared, tell)
            notes += quantizer.quantize(
                plain, target, options, matrix, lambda *told: tell("quantizing", *told)
            )
            used = dict(options)
    finally:
        if source.work is None:
            shutil.rmtree(shared, ignore_errors=True)
    return Made(libraries, used, tuple(notes))


def _check_options(options: Mapping[str, Any]) -> None:
    defaults = {name: field.default for name, field in quantizer.fields().items()}
    for pattern, type in (options.get("tt_overrides") or {}).items():
        if str(type).upper() not in headers.READ:
            raise unknown_name(f"type of `{pattern}`", str(type), headers.READ)
    if options["ftype"] in _PLAIN:
        for name, default in defaults.items():
            if name not in ("ftype", "nthread") and options[name] != default:
                raise BridgeError(
                    "invalid_option",
                    f"`{name}` has no effect on {options['ftype']}, which is not quantized.",
                    {"option": name},
                    remedy="Leave it out.",
                )
        return
    # The rest of what can go wrong, the quantizer says itself.
    tried = _tried(options, is_weighted=True)
    if tried.error:
        raise BridgeError(
            "invalid_option",
            f"llama.cpp does not make {options['ftype']} with these options: {tried.error}.",
            {"option": "ftype", "options": dict(options), "version": quantizer.version()},
            remedy=f"Choose another type: {', '.join(quantizer.file_types())}.",
        )
    if unread := tried.types.keys() - headers.READ:
        raise BridgeError(
            "unsupported",
            f"Files of the type {options['ftype']} have weights in {', '.join(sorted(unread))}, "
            "which engines do not read here.",
            {"option": "ftype", "types": sorted(unread)},
            remedy=f"Choose types of {', '.join(sorted(headers.KEPT))}.",
        )


def _tried(options: Mapping[str, Any], is_weighted: bool) -> quantizer.Tried:
    return quantizer.tried(
        {name: value for name, value in options.items() if name != "outtype"}, is_weighted
    )


def _converted(source: Source, outtype: str, folder: str, tell: Tell) -> tuple[str, list[str]]:
    """The model as a file that is not quantized, and what is to be said of it. It is made where it
    is not there yet, of the source as it is now."""
    path = os.path.join(folder, f"{_fingerprint(source.path)}-{outtype}.gguf")
    said = f"{path}.json"
    if not os.path.exists(path):
        part = f"{path}.part"
        notes = converter.convert(
            source.path, outtype, part, lambda *told: tell("converting", *told)
        )
        # Before hours go into a file that no engine reads.
        gguf_model.check(gguf_model.look_at(part, {}))
        with open(said, "w", encoding="utf-8") as file:
            json.dump(notes, file)
        os.replace(part, path)
    with open(said, encoding="utf-8") as file:
        return path, json.load(file)


def _importance(plain: str, texts: "Texts", folder: str, tell: Tell) -> "Importance":
    digest = hashlib.sha256("\0".join(texts.texts).encode()).hexdigest()[:16]
    path = f"{plain.removesuffix('.gguf')}-{digest}-{texts.max_samples}.imatrix.gguf"
    if not os.path.exists(path):
        matrix, tokens = importance.compute(
            plain, texts.texts, texts.max_samples, lambda *told: tell("calibrating", *told)
        )
        importance.write(path, matrix, texts.source, tokens)
    matrix, texts.tokens = importance.read(path)
    return matrix


def _fingerprint(folder: str) -> str:
    """Of the files of a model, as far as one sees without reading them."""
    seen = hashlib.sha256()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stat = entry.stat()
        seen.update(f"{entry.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return seen.hexdigest()[:16]
