"""What a user's ``model`` is: a folder, a file, a name of the registry, a name on the hub.

vLLM would find most of what is wrong with it too, but later (after seconds, or after a download),
less clearly, and with processes already started.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from vllm_bridge.checkpoints import adapter, families, files, gguf, gguf_model, torch_files
from vllm_bridge.checkpoints.checkpoint import Checkpoint, Found
from vllm_bridge.checkpoints.config import CONFIGS, read_config
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.hub import download, ghost, names
from vllm_bridge.hub.look_up import look_up
from vllm_bridge.hub.repository import Repository
from vllm_bridge.quantization import registry
from vllm_bridge.registry import find as named

# Files with weights that are left to vLLM, in the order in which it looks for them.
_PICKLED = (".bin", ".pt", ".pth")

# What trainers leave beside them, and vLLM does not read.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")

# How addresses of pages begin. Nothing is loaded from those.
_WEB = ("https://", "http://")


def check_model(
    model: str, options: Mapping[str, Any], progress: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """What is known of the model.

    Args:
        progress: told ``"hub"`` before the hub is asked, which may take seconds

    Raises:
        BridgeError: ``model_not_found``, ``not_a_model``, ``model_gated``, ``hub_unreachable`` or
            ``invalid_checkpoint``
    """
    if is_elsewhere(model):
        return Checkpoint()
    return look_at(locate(model, options, progress), options)


def is_elsewhere(model: str) -> bool:
    """Whether it is in storage that only vLLM can look into, such as ``s3://bucket/model``."""
    return "://" in model and not model.startswith(_WEB)


class Place(NamedTuple):
    """Where a model can be looked at.

    Args:
        path: of a folder or a file
        repository: where its weights are still to be fetched from; None where they are in ``path``
    """

    path: str
    repository: Repository | None = None


def locate(
    model: str, options: Mapping[str, Any], progress: Callable[[str], None] = lambda _: None
) -> Place:
    """Finds a model, or anything else that has a name on the hub.

    Args:
        progress: told ``"hub"`` before the hub is asked, which may take seconds

    Raises:
        BridgeError: ``model_not_found``, ``model_gated`` or ``hub_unreachable``
    """
    found = find(model, options)
    if isinstance(found, str):
        return Place(found)
    try:
        repository = look_up(found, options, progress)
    except BridgeError as error:
        raise _or_ours(error, model) from error
    if (path := download.here(repository, options)) is not None:
        return Place(path)
    return Place(ghost.of(repository, options), repository)


def look_at(place: Place, options: Mapping[str, Any]) -> Checkpoint:
    """What is known of the model in a place.

    Raises:
        BridgeError: ``not_a_model`` or ``invalid_checkpoint``
    """
    if place.repository is None:
        return _check_path(place.path, options)
    try:
        checkpoint = _check_path(place.path, options)
    except BridgeError as error:
        raise ghost.named(error) from error
    tensors = {name: one._replace(file="") for name, one in checkpoint.tensors.items()}
    return dataclasses.replace(checkpoint, tensors=tensors, repository=place.repository)


def find(model: str, options: Mapping[str, Any]) -> str | names.Name:
    """A model as the path of what is here, where it was named by that or by a name of the registry,
    or else as its name on the hub. Looks at nothing but whether it is here.

    Raises:
        BridgeError: ``model_not_found`` for what can be neither, ``invalid_option``
    """
    if not model:
        raise BridgeError(
            "model_not_found",
            "No model was named.",
            remedy="Give the path of one, or its name on the Hugging Face hub.",
        )
    if os.path.exists(model):
        _refuse_subfolder(model, options)
        return model
    if os.path.islink(model):
        raise BridgeError(
            "model_not_found",
            f"`{model}` is a link to `{os.readlink(model)}`, which is not there.",
            {"model": model},
            remedy="Download the model again, or name where it is.",
        )
    if model.startswith(_WEB):
        page = "/".join(model.split("/")[3:5])
        raise BridgeError(
            "model_not_found",
            f"`{model}` is the address of a page.",
            {"model": model},
            remedy=f"Give the model's name on the Hugging Face hub: `{page or 'org/name'}`.",
        )
    if (known := named.path_or_name(model)) is not None:
        if os.path.exists(known):
            _refuse_subfolder(model, options)
            return known
        model = known  # an alias of what is on the hub
    name = names.parse(model)
    # Where a folder is here, so should be its files.
    if name is not None and not (name.file and os.path.isdir(os.path.dirname(model))):
        return name
    if model.endswith(gguf_model.SUFFIX):
        raise BridgeError(
            "model_not_found",
            f"There is no file `{model}`.",
            {"model": model},
            remedy=_similar(model) or "Give the path of one.",
        )
    raise BridgeError(
        "model_not_found",
        f"There is no folder `{model}`.",
        {"model": model},
        remedy=_similar(model) or "Give the path of one, or a model's name on the hub.",
    )


def _or_ours(error: BridgeError, model: str) -> BridgeError:
    """The hub's answer, with the name of the registry that may have been meant."""
    if (meant := named.meant(model)) is None:
        return error
    remedy = did_you_mean(meant) + error.remedy
    return BridgeError(error.reason, error.what, error.details | {"nearest": meant}, remedy)


def _refuse_subfolder(model: str, options: Mapping[str, Any]) -> None:
    if options.get("subfolder"):
        raise BridgeError(
            "invalid_option",
            f"`subfolder` is for models on the hub, and `{model}` is here.",
            {"option": "subfolder", "value": options["subfolder"]},
            remedy="Name the folder that the model is in, and leave `subfolder` out.",
        )


def _check_path(path: str, options: Mapping[str, Any]) -> Checkpoint:
    return _check_folder(path, options) if os.path.isdir(path) else _check_file(path, options)


def check_beside(name: str, options: Mapping[str, Any]) -> None:
    """Looks whether what an option names in the place of a part of the model can be such.

    Args:
        name: of the option, whose value is a folder here or a name on the hub

    Raises:
        BridgeError: ``invalid_option`` for a GGUF file, ``model_not_found`` for a path to nothing
    """
    given = options.get(name)
    if not isinstance(given, str):
        return
    details = {"option": name, "value": given}
    if given.endswith(gguf_model.SUFFIX) and not os.path.isdir(given):
        raise BridgeError(
            "invalid_option",
            f"`{name}` is a folder with files as Hugging Face has them, or a name on the hub, and "
            f"`{given}` is a GGUF file.",
            details,
            remedy="Leave the option out to use the model's own.",
        )
    if given.startswith(("/", ".", "~")) and not os.path.exists(given):
        raise BridgeError(
            "model_not_found",
            f"`{name}` names `{given}`, and there is no such folder.",
            details,
            remedy=_similar(given) or "Leave the option out to use the model's own.",
        )


def _check_folder(folder: str, options: Mapping[str, Any]) -> Checkpoint:
    names = set(os.listdir(folder))
    if path := _gguf_of(folder, names, options):
        return gguf_model.look_at(path, options)
    config_folder = options.get("hf_config_path")
    if config_folder is None and not names.intersection(CONFIGS):
        families.check_folder(folder, names)
        what, remedy = _why_no_model(folder, names)
        raise BridgeError("not_a_model", what, {"model": folder}, remedy)
    config = {} if "config.json" not in names else read_config(folder)
    load_format = files.load_format(options)
    if load_format not in files.LOAD_FORMATS:
        return Checkpoint(folder, config)
    if (found := _find(folder, config, names)) is not None and found.files:
        return _found(folder, config, found)
    form = files.format_of(names, options)
    weights = files.weight_files(folder, names, form)
    if not weights:
        if not any(name.endswith(_PICKLED) for name in names):
            raise BridgeError(
                "invalid_checkpoint",
                f"`{folder}` has a config and no weights (*.safetensors).",
                {"model": folder},
                remedy="Finish its download, or repeat it.",
            )
        return Checkpoint(folder, config, tensors=_pickled(folder, names))
    read = Found(
        config={} if found is None else found.config,
        files=tuple(weights),
        tensors=files.read_tensors(folder, weights, form),
        load_format=form if load_format == "auto" else load_format,
    )
    return _found(folder, config, read)


def _find(folder: str, config: Mapping[str, Any], names: Collection[str]) -> Found | None:
    """How a model is quantized whose config does not say so."""
    if Checkpoint(config=config).quantization is not None:
        return None
    found = (method.find(folder, names) for method in registry.every())
    return next((one for one in found if one is not None), None)


def _found(folder: str, config: Mapping[str, Any], found: Found) -> Checkpoint:
    return Checkpoint(
        folder,
        config,
        load_format=found.load_format,
        files=found.files,
        tensors=found.tensors,
        found=found.config or None,
    )


def _pickled(folder: str, names: Collection[str]) -> dict[str, Tensor]:
    """What is in the files of ``torch.save``; nothing where that cannot be told without torch."""
    weights: list[str] = []
    for suffix in _PICKLED:
        weights = weights or sorted(
            {n for n in names if n.endswith(suffix)}.difference(_NO_WEIGHTS)
        )
    found: dict[tuple[str, int], tuple[str, Tensor]] = {}
    for name in weights:
        try:
            contents = torch_files.read(os.path.join(folder, name))
        except BridgeError:
            return {}
        if not isinstance(contents, dict):
            return {}
        for key, tensor in contents.items():
            if isinstance(tensor, Tensor):
                # Those that are tied are stored once, and have a name each.
                found.setdefault((tensor.file, tensor.start), (key, tensor))
    return dict(found.values())


def _gguf_of(folder: str, names: set[str], options: Mapping[str, Any]) -> str | None:
    """The GGUF file that a folder is about: one without other weights, if nothing else is asked
    for."""
    others = any(name.endswith((".safetensors", *_PICKLED)) for name in names)
    if others and files.load_format(options) != "gguf":
        return None
    return gguf_model.find(folder, names)


def _check_file(path: str, options: Mapping[str, Any]) -> Checkpoint:
    if path.endswith(gguf_model.SUFFIX):
        return gguf_model.look_at(path, options)
    if gguf.is_one(path):
        raise BridgeError(
            "not_a_model",
            f"`{path}` is a GGUF file by another name.",
            {"model": path},
            remedy=(
                f"Give it one that ends with `{gguf_model.SUFFIX}`, or name a link to it that does."
            ),
        )
    raise BridgeError(
        "not_a_model",
        f"`{path}` is a file.",
        {"model": path},
        remedy=(
            "A model is a folder with a `config.json` and weights, a GGUF file, or the name of a "
            "model on the Hugging Face hub."
        ),
    )


def _why_no_model(folder: str, names: set[str]) -> tuple[str, str]:
    """What is the matter with a folder, and what to do about it."""
    where = f"`{folder}` has no `config.json`"
    if adapter.CONFIG in names:
        return (
            f"{where}: it is a LoRA adapter.",
            "Load the base model with `enable_lora: true` and give the adapter per request.",
        )
    if not names:
        return f"`{folder}` is empty.", "Finish its download, or repeat it."
    below = sorted(
        name for name in names if os.path.exists(os.path.join(folder, name, "config.json"))
    )
    if below:
        return f"{where}, but the folder {below[0]} in it has one.", "Did you mean that?"
    return f"{where}, so it is not a model.", "Name the folder of one."


def _similar(path: str) -> str:
    parent, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    try:
        suggestion = nearest(name, os.listdir(parent))
    except (OSError, ValueError):  # the latter of a path with a zero byte
        return ""
    return did_you_mean(suggestion and os.path.join(parent, suggestion))
