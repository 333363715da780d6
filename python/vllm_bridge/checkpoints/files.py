"""Which safetensors files of a folder a model is loaded from, and which of them each tensor.

vLLM reads every file that its patterns match, and of a tensor that two of them hold the copy that
comes last. Here the index decides, as the format means it to, and without one nobody guesses.
``patches.weight_files`` has vLLM's loaders go by it.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from vllm_bridge import json_files
from vllm_bridge.checkpoints import adapter
from vllm_bridge.checkpoints.headers import Tensor, read_header
from vllm_bridge.errors import BridgeError

# Where the formats of vLLM's `load_format` have their index.
INDEXES: Final = {
    "hf": "model.safetensors.index.json",
    "mistral": "consolidated.safetensors.index.json",
}

# The values of `load_format` that read safetensors files as described here.
LOAD_FORMATS: Final = ("auto", "hf", "mistral", "safetensors", "fastsafetensors", "instanttensor")

# Weights of a layer, of which computed ones (`inv_freq`) are none.
_OF_LAYER = re.compile(r"\.\d+\..*(?<!inv_freq)$")


def load_format(options: Mapping[str, Any]) -> str:
    """vLLM's ``load_format`` among the engine options."""
    return _lower(options.get("load_format"))


def format_of(names: Collection[str], options: Mapping[str, Any]) -> str:
    """The format that a folder's weights are read in, ``"hf"`` or ``"mistral"``.

    Mistral's folders hold the model in both, and the format of the config is that of the weights.

    Args:
        names: of the files in the folder
        options: the engine options, of which ``load_format`` and ``config_format`` count
    """
    if (given := load_format(options)) != "auto":
        return "mistral" if given == "mistral" else "hf"
    files = _safetensors(names)
    consolidated = [name for name in files if _is_consolidated(name)]
    config_format = _lower(options.get("config_format"))
    is_mistral = config_format == "mistral" or (config_format == "auto" and "params.json" in names)
    if consolidated and (is_mistral or len(consolidated) == len(files)):
        return "mistral"
    return "hf"


def weight_files(folder: str, names: Iterable[str], form: str) -> list[str]:
    """The names of the files with the weights, in order.

    Args:
        names: of the files in the folder
        form: what ``format_of`` returned

    Raises:
        BridgeError: ``invalid_checkpoint`` for an index that cannot be read, or whose files are
            not all there
    """
    files = _safetensors(names)
    if form == "mistral":
        files = [name for name in files if _is_consolidated(name)]
    weight_map = _read_index(folder, form)
    if weight_map is None:
        return _without_second_spelling(folder, files)
    indexed = sorted(set(weight_map.values()))
    missing = [name for name in indexed if name not in files]
    if missing:
        raise BridgeError(
            "invalid_checkpoint",
            f"{len(missing)} of {len(indexed)} weight files are missing in `{folder}`, the first "
            f"is {missing[0]}.",
            {"model": folder, "missing": missing},
            remedy="Finish its download, or repeat it.",
        )
    return indexed


def read_tensors(folder: str, files: Sequence[str], form: str) -> dict[str, Tensor]:
    """The tensors of a folder's weight files, each from the file that it is to be read from.

    Raises:
        BridgeError: ``invalid_checkpoint`` for a file that is damaged, for a tensor that several
            files hold and no index decides about, or where files lack weights of layers that the
            index says are in them
    """
    return _decided(folder, form, [read_header(os.path.join(folder, file)) for file in files])


def strays(paths: Sequence[str]) -> dict[str, set[str]]:
    """The tensors that are not to be read from these weight files of one folder, because another
    one has them; by the file's path.

    Args:
        paths: as ``weight_files`` names them

    Raises:
        BridgeError: see ``read_tensors``
    """
    if len(paths) < 2:
        return {}
    folder, names = os.path.dirname(paths[0]), [os.path.basename(path) for path in paths]
    form = "mistral" if all(map(_is_consolidated, names)) else "hf"
    headers = [read_header(path) for path in paths]
    tensors = _decided(folder, form, headers)
    found = (
        {name for name, tensor in header.items() if tensors[name] != tensor} for header in headers
    )
    return {path: strays for path, strays in zip(paths, found, strict=True) if strays}


def _decided(folder: str, form: str, headers: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    weight_map = _read_index(folder, form) or {}
    held: dict[str, list[Tensor]] = defaultdict(list)
    for header in headers:
        for name, tensor in header.items():
            held[name].append(tensor)
    tensors = {}
    for name, copies in held.items():
        tensors[name] = copies[0]
        if len(copies) > 1:
            indexed = weight_map.get(name)
            by_file = {os.path.basename(tensor.file): tensor for tensor in copies}
            if indexed not in by_file:
                raise _undecided(folder, name, list(by_file), indexed)
            tensors[name] = by_file[indexed]
    _check_index(folder, form, weight_map, tensors)
    return tensors


def _without_second_spelling(folder: str, files: list[str]) -> list[str]:
    """Leaves Mistral's weights out that lie beside the same weights under Hugging Face's names."""
    consolidated = [name for name in files if _is_consolidated(name)]
    others = [name for name in files if not _is_consolidated(name)]
    if not consolidated or not others:
        return files
    names = {n for file in consolidated for n in read_header(os.path.join(folder, file))}
    if any(not names.isdisjoint(read_header(os.path.join(folder, file))) for file in others):
        return files  # it is no other spelling
    return others


def _undecided(folder: str, name: str, files: list[str], indexed: str | None) -> BridgeError:
    index = f", and its index gives it to {indexed}" if indexed else ""
    return BridgeError(
        "invalid_checkpoint",
        f"{' and '.join(files[:2])} in `{folder}` both hold the tensor `{name}`{index}: it cannot "
        "be told which of them the model means.",
        {"model": folder, "tensor": name, "files": files},
        remedy=(
            "Remove the file that does not belong to it (one that an earlier download or another "
            "tool left behind), or download the model again, with its index."
        ),
    )


def _check_index(
    folder: str, form: str, named: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Raises ``invalid_checkpoint`` if files lack layers' weights that the index says are in them.
    vLLM goes by the files alone, and would run with what the memory held.

    An index that knows less than half of the weights was left behind by another model; and there
    are some that name tensors which nobody needs, such as tied heads.
    """
    missing = sorted(name for name in named if name not in tensors and _OF_LAYER.search(name))
    if missing and len(missing) < len(named) / 2:
        raise BridgeError(
            "invalid_checkpoint",
            f"The files in `{folder}` lack {len(missing)} of the {len(named)} tensors that "
            f"{INDEXES[form]} names, the first is {missing[0]}.",
            {"model": folder, "missing": missing[:10]},
            remedy="Download them again.",
        )


def _read_index(folder: str, form: str) -> dict[str, str] | None:
    """Which file each tensor is in; None where there is no index."""
    path = os.path.join(folder, INDEXES[form])
    if not os.path.exists(path):
        return None
    try:
        weight_map = json_files.read(path)["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("a file's name is a string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BridgeError(
            "invalid_checkpoint",
            f"`{path}` cannot be read: {error!r}.",
            {"model": folder},
            remedy="Download it again.",
        ) from error
    return dict(weight_map)


def _safetensors(names: Iterable[str]) -> list[str]:
    """Those of the model: weights of an adapter may lie beside them."""
    return sorted(n for n in names if n.endswith(".safetensors") and n not in adapter.WEIGHTS)


def _is_consolidated(name: str) -> bool:
    return name.startswith("consolidated")


def _lower(value: Any) -> str:
    return value.lower() if isinstance(value, str) else "auto"
