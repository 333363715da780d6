"""Gives names to models, and takes them away."""

import os
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_bridge.checkpoints.detect import detect
from vllm_bridge.errors import BridgeError, did_you_mean
from vllm_bridge.hub import names as hub_names
from vllm_bridge.registry import find, in_place, store
from vllm_bridge.registry.entry import Entry, Names, check_word, parse


def register(
    path: str,
    name: str,
    label: str | None = None,
    *,
    replace: bool = False,
    about: Mapping[str, Any] = {},
) -> Entry:
    """Gives a name to a model or an adapter, after a look at its files.

    Args:
        path: of a folder or a GGUF file
        label: tells it from other outputs of this name
        replace: whether it may take the place of another of that name
        about: what else is known of it, fields of ``Entry``

    Raises:
        BridgeError: ``name_taken``; ``invalid_option`` for what can be no name;
            ``model_not_found``, ``not_a_model`` or ``invalid_checkpoint`` for what has no model;
            ``cache_not_writable`` or ``disk_full``
    """
    check_word(name, "name")
    if label is not None:
        check_word(label, "label")
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(path):
        raise BridgeError(
            "model_not_found",
            f"There is no folder or file `{path}`.",
            {"model": path},
            remedy="Give the path of a model that is here. Models of the hub have names already; "
            "`VLLM.Models.alias/3` gives them another.",
        )
    found = detect(path, {})
    told = {
        "size": size(path),
        "method": found.method,
        "bits": found.bits,
        "base_model": found.base_model if found.adapter is None else found.adapter.base_model,
    }
    entry = Entry(
        name=name,
        label=label,
        path=path,
        kind="model" if found.adapter is None else "adapter",
        registered_at=time.time(),
        **told | {key: value for key, value in about.items() if value is not None},
    )
    with store.changing() as change:
        holder = find.holder(name, label, path)
        if holder is not None and (holder.is_alias or not replace):
            raise _taken(holder.name, holder.what, can_replace=not holder.is_alias)
        names = store.read(name) or Names(name=name)
        others = [one for one in names.outputs if one.label != label]
        change.write(msgspec.structs.replace(names, outputs=[*others, entry]))
    return entry


def alias(model: str, name: str, *, replace: bool = False) -> None:
    """Gives a model another name.

    Args:
        model: a name of the registry, or of the hub
        replace: whether it may be taken from another model

    Raises:
        BridgeError: ``model_not_found`` for a model without a name, ``invalid_option`` for what
            can be no name, ``name_taken``, ``cache_not_writable`` or ``disk_full``
    """
    check_word(name, "name")
    with store.changing() as change:
        target = _target(model)
        names = store.read(name)
        if names is not None and names.alias_of != target:
            if names.alias_of is None:
                raise _taken(name, "a model of its own", can_replace=False)
            if not replace:
                raise _taken(name, f"another name of `{names.alias_of}`")
        change.write(Names(name=name, alias_of=target))


def unregister(model: str) -> tuple[int, list[str]]:
    """Takes a name away, with the files of what was made here; those of other folders stay.

    Args:
        model: a name, where it has one output, ``name:label``, or an alias, which is all that goes
            then

    Returns:
        tuple: how many bytes that freed, and the names that are gone

    Raises:
        BridgeError: ``model_not_found``, ``cache_not_writable``
    """
    with store.changing() as change:
        parsed = parse(model)
        names = store.read(parsed[0]) if parsed is not None else None
        if names is not None and names.alias_of is not None and names.name == model:
            change.write(Names(name=model))
            return 0, [model]
        entry = find.find(model)
        if not isinstance(entry, Entry):
            raise unknown(model)
        freed = 0
        if store.is_made_here(entry.path) and not entry.is_missing and not _is_shared(entry):
            freed = size(change.discard(entry.path))
        names = store.read(entry.name)
        assert names is not None  # noqa: S101 - the entry is one of its outputs
        left = [one for one in names.outputs if one.label != entry.label]
        change.write(msgspec.structs.replace(names, outputs=left))
        return freed, [entry.full_name, *_forget_aliases(change, entry.full_name)]


def delete_in_place(model: str, *, is_forced: bool = False) -> tuple[int, list[str]]:
    """Deletes what was quantized in place, and its aliases.

    Args:
        is_forced: whether also where an engine uses it

    Raises:
        BridgeError: ``model_not_found``, ``in_use`` or ``cache_not_writable``
    """
    with store.changing() as change:
        entry = find.find(model)
        if not isinstance(entry, Entry):
            raise unknown(model)
        freed = in_place.delete(entry.path, is_forced=is_forced)
        return freed, [entry.full_name, *_forget_aliases(change, entry.full_name)]


def _forget_aliases(change: store.Change, name: str) -> list[str]:
    """Takes the other names of a model away that is gone, and tells them."""
    gone = [other.name for other in store.every() if other.alias_of == name]
    for alias in gone:
        change.write(Names(name=alias))
    return gone


def _is_shared(entry: Entry) -> bool:
    """Whether its files have another name, too."""
    every = [one for names in store.every() for one in names.outputs]
    return sum(one.path == entry.path for one in every) > 1


def unknown(model: str) -> BridgeError:
    """The error for a name that nobody gave to anything."""
    meant = find.meant(model)
    return BridgeError(
        "model_not_found",
        f"There is no model of the name `{model}` on this machine.",
        {"model": model, "nearest": meant},
        remedy=did_you_mean(meant) + "`mix vllm.models` lists them.",
    )


def size(path: str) -> int:
    """Of the files of a model, in bytes."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    files = (os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def _target(model: str) -> str:
    """What an alias stands for: never another alias, which may be gone tomorrow."""
    found = find.find(model)
    if isinstance(found, Entry):
        return found.full_name
    if found is not None:
        return found
    if "/" in model and hub_names.parse(model) is not None:
        return model
    raise unknown(model)


def _taken(name: str, by: str, *, can_replace: bool = True) -> BridgeError:
    return BridgeError(
        "name_taken",
        f"The name `{name}` is {by} already.",
        {"option": "name", "value": name},
        remedy="Take another name"
        + (", or give `replace: true`." if can_replace else ", or delete that one first."),
    )
