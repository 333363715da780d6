"""A model that is a GGUF file."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from vllm_bridge.checkpoints import files, gguf, gguf_config, gguf_names
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError

SUFFIX: Final = ".gguf"

# vLLM's values of `load_format` that a GGUF file can be read with.
_LOAD_FORMATS: Final = ("auto", "gguf", "dummy")

# What lies beside a model in files of its own: a part for pictures or sound, and what quantizers
# use.
_BESIDE: Final = ("mmproj", "imatrix")


def find(folder: str, names: Iterable[str]) -> str | None:
    """The path of the GGUF file in a folder; of one that is split, its first part.

    Args:
        names: of the files in it

    Raises:
        BridgeError: ``not_a_model`` if it has several that are a model each
    """
    paths = {gguf.parts(os.path.join(folder, name))[0] for name in names if name.endswith(SUFFIX)}
    models = [path for path in sorted(paths) if is_model(path)]
    if len(models) > 1:
        found = [os.path.basename(path) for path in models]
        raise BridgeError(
            "not_a_model",
            f"`{folder}` has several models: {', '.join(found)}.",
            {"model": folder, "files": found},
            remedy=f"Name the file of one: `{models[0]}`.",
        )
    return models[0] if models else min(paths, default=None)


def is_model(path: str) -> bool:
    """Whether a file is a model, or a part of one, by its name."""
    name = os.path.basename(path)
    return name.endswith(SUFFIX) and not any(word in name.lower() for word in _BESIDE)


def look_at(path: str, options: Mapping[str, Any]) -> Checkpoint:
    """What is known of the model in a GGUF file.

    Args:
        path: of the file, or of any of its parts
        options: the engine options, of which ``load_format`` counts

    Raises:
        BridgeError: ``invalid_checkpoint``, ``unsupported_model``, ``not_a_model`` or
            ``invalid_option``
    """
    load_format = files.load_format(options)
    if load_format not in _LOAD_FORMATS:
        raise BridgeError(
            "invalid_option",
            f'`load_format: "{load_format}"` does not go with a GGUF file.',
            {"option": "load_format", "value": load_format, "allowed": list(_LOAD_FORMATS)},
            remedy="Leave it out.",
        )
    file = gguf.read(path)
    _check_kind(file)
    config = gguf_config.config(file)
    return Checkpoint(
        os.path.dirname(path) or ".",
        config,
        files=tuple(os.path.basename(part) for part in file.parts),
        tensors={name: file.tensors[key] for key, name in gguf_names.names(file, config).items()},
        load_format="gguf" if load_format == "auto" else load_format,
    )


def check(checkpoint: Checkpoint) -> None:
    """Looks whether the tensors are those of the model that the file describes.

    Raises:
        BridgeError: ``invalid_checkpoint`` where one is missing or of another shape;
            ``unsupported_quantization`` for a type that cannot be computed here
    """
    path = os.path.join(checkpoint.folder or "", *checkpoint.files[:1])
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in gguf.READ:
            raise BridgeError(
                "unsupported_quantization",
                f"`{name}` in `{path}` is {tensor.dtype}, of which there are no weights to make "
                "here.",
                {"file": path, "tensor": name, "type": tensor.dtype, "allowed": sorted(gguf.KEPT)},
                remedy=f"Use a variant of the model in one of {', '.join(sorted(gguf.KEPT))}.",
            )
    gguf_names.check(path, checkpoint.config, checkpoint.tensors)


def _check_kind(file: gguf.File) -> None:
    """Raises ``not_a_model`` for what else GGUF files hold."""
    kind, architecture = (file.metadata.get(f"general.{key}") for key in ("type", "architecture"))
    if kind == "mmproj" or architecture == "clip":
        raise BridgeError(
            "not_a_model",
            f"`{file.path}` is a projector (mmproj), the part of a model that takes pictures or "
            "sound.",
            {"model": file.path},
            remedy=(
                "Give the GGUF file of the model itself, which answers text; for pictures, use "
                "the model in the form that Hugging Face has it in."
            ),
        )
    if kind == "adapter":
        raise BridgeError(
            "not_a_model",
            f"`{file.path}` is a LoRA adapter.",
            {"model": file.path},
            remedy=(
                "Load the base model with `enable_lora: true` and give the adapter per request, "
                "in the form that peft saves it in."
            ),
        )
    if kind == "imatrix":
        raise BridgeError(
            "not_a_model",
            f"`{file.path}` is an importance matrix, with which models are quantized.",
            {"model": file.path},
            remedy="Give the GGUF file of the model.",
        )
