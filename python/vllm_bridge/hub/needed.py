"""Which files of a repository a model takes. Repositories hold it in several formats side by side,
and much that no engine reads.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from vllm_bridge.checkpoints import adapter, config, files, gguf_model
from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.hub.names import Name

# The variant of GGUF files that is meant where none is named, as llama.cpp has it.
DEFAULT_VARIANT: Final = "Q4_K_M"

# What models have beside weights: configs, tokenizers, templates, code of their own.
_SMALL: Final = (
    ".json", ".txt", ".jinja", ".py", ".model", ".tiktoken", ".spm", ".vocab", ".bpe", ".yaml",
)  # fmt: skip

# What makes a folder a model, or an adapter. Without these, other files in it are none.
CONFIGS: Final = (*config.CONFIGS, adapter.CONFIG)

_SAFETENSORS: Final = ".safetensors"

# How files end that have weights.
WEIGHTS: Final = (_SAFETENSORS, gguf_model.SUFFIX, ".bin", ".pt", ".pth")

# What else is kept in files of pickle's: states of a training.
_NO_WEIGHTS: Final = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler|adapter_model")

# Folders of a repository that are part of its model: modules of sentence-transformers, templates.
_FOLDERS: Final = re.compile(r"\d+_\w+|additional_chat_templates")

_SHARD: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<suffix>\.\w+)")


def needed(paths: Iterable[str], name: Name, options: Mapping[str, Any]) -> list[str]:
    """The files of a model, small ones first; without weights where a repository has none.

    Args:
        paths: of all files of the repository, below the folder that is the model's
        name: which GGUF file is meant, where one is
        options: of which ``load_format`` and ``config_format`` count

    Raises:
        BridgeError: ``model_not_found`` for a GGUF file that is not there, or where it cannot be
            told which is meant
    """
    paths = sorted(paths)
    top = [path for path in paths if "/" not in path]
    small = [path for path in paths if _is_small(path)]
    if name.file or name.variant or _is_gguf(paths, top, options):
        return small + gguf(paths, name)
    below = [path for path in paths if "/" in path and _FOLDERS.fullmatch(path.split("/")[0])]
    return small + _weights(top, options) + [path for path in below if _is_safetensors(path)]


def gguf(paths: Sequence[str], name: Name) -> list[str]:
    """The GGUF file that is meant, all parts of it in order."""
    models = [path for path in paths if gguf_model.is_model(path)]
    if name.file is not None:
        found = [path for path in models if path == name.file]
        found = found or [path for path in models if os.path.basename(path) == name.file]
    else:
        variant = name.variant or DEFAULT_VARIANT
        found = [path for path in models if _is_variant(path, variant)]
        plain = [path for path in found if not _is_variant(path, f"UD-{variant}")]
        found = plain or found  # beside the usual one there may be unsloth's
    wholes: dict[str, list[str]] = {}
    for path in found:
        wholes.setdefault(_whole(path), []).append(path)
    if not found and not (name.file or name.variant) and len(set(map(_whole, models))) == 1:
        return list(models)  # there is nothing to choose
    if len(wholes) != 1:
        raise _no_single(name, models, list(wholes))
    (whole,) = wholes
    # One part stands for all of them.
    return [path for path in models if _whole(path) == whole]


def _is_gguf(paths: Iterable[str], top: Iterable[str], options: Mapping[str, Any]) -> bool:
    """Whether the model is a GGUF file although none was named."""
    if not any(map(gguf_model.is_model, paths)):
        return False
    return files.load_format(options) == "gguf" or not _weights(list(top), options)


def _weights(top: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The files with weights among those of the model's own folder."""
    load_format = files.load_format(options)
    safetensors = [path for path in top if _is_safetensors(path) and path not in adapter.WEIGHTS]
    if safetensors and load_format not in ("pt", "npcache"):
        form = files.format_of(top, options)
        consolidated = [path for path in safetensors if path.startswith("consolidated")]
        others = [path for path in safetensors if path not in consolidated]
        return consolidated if form == "mistral" else _without_copies(others) or consolidated
    for suffixes in ((".bin",), (".pt", ".pth")):
        found = [path for path in top if path.endswith(suffixes) and not _NO_WEIGHTS.search(path)]
        if found and not (load_format == "pt" and ".bin" in suffixes):
            return _without_copies(found)
    return [path for path in adapter.WEIGHTS if path in top][:1]


def _without_copies(paths: Sequence[str]) -> list[str]:
    """Leaves out what is there a second time: whole beside its shards, or in another dtype
    (``model.fp16.safetensors``)."""
    stems = {match["stem"] for match in map(_SHARD.fullmatch, paths) if match}
    wholes = {path for path in paths if os.path.splitext(path)[0] in stems}
    kept = [path for path in paths if path not in wholes]
    names = {_stem(path) for path in kept}
    return [path for path in kept if _stem(path).rpartition(".")[0] not in names]


def _stem(path: str) -> str:
    match = _SHARD.fullmatch(path)
    return match["stem"] if match else os.path.splitext(path)[0]


def _is_small(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    # Mistral's tokenizers have versions: `tokenizer.model.v3`.
    if not name.endswith(_SMALL) and not name.startswith("tokenizer.model"):
        return False
    if name.endswith(".py"):
        return True  # code of a model may be in packages
    return not folder or _FOLDERS.fullmatch(folder) is not None


def _is_safetensors(path: str) -> bool:
    return path.endswith(_SAFETENSORS)


def _is_variant(path: str, variant: str) -> bool:
    """Whether a file is named after a quantization: ``Q4_K`` is not in ``…-Q4_K_M.gguf``. Parts of
    a file may have it in the name of their folder only."""
    pattern = rf"(?<![A-Za-z0-9]){re.escape(variant)}(?![A-Za-z0-9_])"
    return re.search(pattern, path, re.IGNORECASE) is not None


def _whole(path: str) -> str:
    match = _SHARD.fullmatch(path)
    return match["stem"] + match["suffix"] if match else path


def _no_single(name: Name, models: Sequence[str], found: Sequence[str]) -> BridgeError:
    wholes = sorted({_whole(path) for path in models})
    details = {"model": name.id, "files": wholes}
    asked = name.file or name.variant
    if not models:
        return BridgeError(
            "model_not_found",
            f"{name.id} on the hub has no GGUF file, and `{asked}` names one.",
            details,
            remedy=f"Name the model alone: `{name.id}`.",
        )
    several = sorted(found) or wholes
    listed = ", ".join(several[:20]) + (", …" if len(several) > 20 else "")
    remedy = f"Name one, such as `{name.id}:{several[0]}`."
    if found:
        what = f"{name.id} on the hub has several GGUF files that `{asked or DEFAULT_VARIANT}` fits"
    elif asked is None:
        what = f"{name.id} on the hub has GGUF files, and none in {DEFAULT_VARIANT}"
    else:
        what = f"{name.id} on the hub has no GGUF file `{asked}`"
        if meant := nearest(asked, wholes):
            remedy = did_you_mean(f"{name.id}:{meant}")
    return BridgeError("model_not_found", f"{what}; it has {listed}.", details, remedy=remedy)
