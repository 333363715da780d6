"""What a name stands for."""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.registry import in_place, store
from vllm_bridge.registry.entry import IN_PLACE, Entry, Names, parse


def find(model: str) -> Entry | str | None:
    """What a name stands for: an output, or, of an alias, a name on the hub. None where nobody
    gave that name to anything.

    Args:
        model: ``name``, where it has one output, or ``name:label``

    Raises:
        BridgeError: ``model_not_found`` for a label that the name does not have, and for a name
            of several outputs without one; ``invalid_checkpoint`` for a damaged registry
    """
    parsed = parse(model)
    if parsed is None:
        return None
    name, label = parsed
    names = _names(name)
    if names is None:
        return None
    if (target := names.alias_of) is None:
        return _chosen(names, label)
    if label is not None:
        if ":" in target:
            raise BridgeError(
                "model_not_found",
                f"`{name}` is another name of `{target}`, and takes no label.",
                {"model": model},
                remedy=f"Name it alone: `{name}`.",
            )
        target = f"{target}:{label}"
    if parse(target) is None:
        return target
    found = find(target)
    # Names without an owner are both ours and the hub's.
    return target if found is None else found


class Holder(NamedTuple):
    """What has a name.

    Args:
        what: it is, in words
        name: by which it can be deleted
        is_alias: whether it has the name with all labels
    """

    what: str
    name: str
    is_alias: bool = False


def holder(name: str, label: str | None, path: str | None = None) -> Holder | None:
    """What keeps a model from a name; None where nothing does.

    Args:
        path: of the model; None for one that is still to be made

    Raises:
        BridgeError: ``invalid_checkpoint`` for a damaged registry
    """
    names = store.read(name) or Names(name=name)
    if names.alias_of is not None:
        return Holder(f"another name of `{names.alias_of}`", name, is_alias=True)
    for one in names.outputs:
        if one.label == label and one.path != path:
            return Holder(f"`{one.path}`", one.full_name)
    return None


def is_alias(name: str) -> bool:
    """Whether it is another name of something."""
    names = store.read(name) if parse(name) == (name, None) else None
    return names is not None and names.alias_of is not None


def is_at(model: str, path: str) -> bool:
    """Whether it is the name, and not another name, of what is at a path."""
    parsed = parse(model)
    names = store.read(parsed[0]) if parsed is not None else None
    return names is not None and any(
        one.full_name == model and one.path == path for one in names.outputs
    )


def path_or_name(model: str) -> str | None:
    """The path of the model that a name stands for, or its name on the hub; None where the name
    stands for nothing here.

    Raises:
        BridgeError: as ``find``, and ``model_not_found`` where its files went away
    """
    found = find(model)
    return found if found is None or isinstance(found, str) else _path(found)


def adapter(name: str) -> Entry | None:
    """The adapter that a name stands for.

    Raises:
        BridgeError: as ``find``, and ``model_not_found`` where its files went away, or where it is
            a model and no adapter
    """
    found = find(name)
    if not isinstance(found, Entry):
        return None
    _path(found)
    if found.kind != "adapter":
        raise BridgeError(
            "model_not_found",
            f"`{name}` is a model, and no adapter.",
            {"model": name, "path": found.path},
            remedy="Serve it by itself, as `VLLM.llm!/2` does; `mix vllm.models` shows which are "
            "adapters.",
        )
    return found


def meant(model: str) -> str | None:
    """The name here that one was probably meant to be, which nobody gave to anything."""
    if parse(model) is None:
        return None
    names = store.every()
    full = [one.full_name for each in names for one in each.outputs]
    return nearest(model, {*full, *(each.name for each in names)})


def _names(name: str) -> Names | None:
    return in_place.names() if name == IN_PLACE else store.read(name)


def _chosen(names: Names, label: str | None) -> Entry:
    """
    Raises:
        BridgeError: ``model_not_found``
    """
    outputs = names.outputs
    if not outputs:
        raise BridgeError(
            "model_not_found",
            "Nothing was quantized in place on this machine.",
            {"model": names.name, "label": label},
            remedy='`VLLM.llm!(model, isq: "Q4_K")` does that to a plain model.',
        )
    if label is None:
        found = [one for one in outputs if one.label is None] or outputs
    else:
        found = [one for one in outputs if one.label == label]
        same = [one for one in outputs if (one.label or "").lower() == label.lower()]
        found = found or same
    if len(found) == 1:
        return found[0]
    details = {"model": names.name, "label": label, "names": [one.full_name for one in outputs]}
    if label is None:
        raise BridgeError(
            "model_not_found",
            f"`{names.name}` has several outputs: {_listed(outputs)}.",
            details,
            remedy=f"Name one: `{outputs[0].full_name}`.",
        )
    close = nearest(label, [one.label for one in outputs if one.label is not None])
    raise BridgeError(
        "model_not_found",
        f"`{names.name}` has no output `{label}`; it has {_listed(outputs)}.",
        details,
        remedy=did_you_mean(close and f"{names.name}:{close}")
        or f"Name one of those: `{outputs[0].full_name}`.",
    )


def _listed(outputs: Sequence[Entry]) -> str:
    return ", ".join(one.label or f"`{one.name}` itself" for one in outputs)


def _path(entry: Entry) -> str:
    if entry.is_missing:
        raise BridgeError(
            "model_not_found",
            f"`{entry.full_name}` is `{entry.path}`, which is not there any more.",
            {"model": entry.full_name, "path": entry.path},
            remedy=f'Make it again, or forget its name: `VLLM.Models.delete("{entry.full_name}")`.',
        )
    return entry.path
