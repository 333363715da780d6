"""The names of models on this machine.

What reads disks or asks the hub runs in a thread, so that the worker hears of it when nobody waits
any more.
"""

import asyncio
import os
from typing import Any

import msgspec

from vllm_bridge.rpc.call import Call
from vllm_bridge.tools.progress import telling


class RegisteredParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``registered``.

    Args:
        name: the only one that is asked for
    """

    name: str | None = None
    download_dir: str | None = None


class RegisterParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``register``: what its files do not say of a model is in the fields after
    ``replace``, which are those of ``registry.entry.Entry``."""

    path: str
    name: str
    label: str | None = None
    replace: bool = False
    base_model: str | None = None
    source: str | None = None
    revision: str | None = None
    quality: dict[str, Any] | None = None
    made: dict[str, Any] | None = None


class UnregisterParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``unregister``.

    Args:
        path: that it has to be of, by exactly this name; None where that is not asked
        in_use: models that engines serve, as these were named
        force: whether what an engine serves is deleted, too
    """

    name: str
    path: str | None = None
    in_use: list[str] = []
    force: bool = False
    download_dir: str | None = None


class TakenParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``taken``.

    Args:
        names: that models are to have which are still to be made: a name, a label and a path each
    """

    names: list[tuple[str, str | None, str]]


class AliasParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``alias``."""

    model: str
    name: str
    replace: bool = False


class PushParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``push``.

    Args:
        repository: of the hub, that it is uploaded to
    """

    model: str
    repository: str
    private: bool = True
    hf_token: str | None = None


async def push(call: Call, params: PushParams) -> dict[str, str]:
    """Uploads what has a name here, and tells how far it is, whenever it has come further."""
    from vllm_bridge.registry.push import push

    return await asyncio.to_thread(
        push,
        params.model,
        params.repository,
        {"hf_token": params.hf_token},
        private=params.private,
        progress=telling(call),
    )


async def registered(_call: Call, params: RegisteredParams) -> list[dict[str, Any]]:
    """What can be served here: what has a name, and what was downloaded."""
    return await asyncio.to_thread(_registered, params)


def _registered(params: RegisteredParams) -> list[dict[str, Any]]:
    from vllm_bridge.registry import listing

    where = {"download_dir": params.download_dir}
    if params.name is not None:
        return [listing.model(params.name, where).to_wire()]
    return [model.to_wire() for model in listing.models(where)]


async def register(_call: Call, params: RegisterParams) -> dict[str, Any]:
    """Gives a name to a folder or a GGUF file."""
    return await asyncio.to_thread(_register, params)


def _register(params: RegisterParams) -> dict[str, Any]:
    from vllm_bridge.registry import edit, listing

    names = ("base_model", "source", "revision", "quality", "made")
    about = {name: getattr(params, name) for name in names}
    entry = edit.register(
        params.path, params.name, params.label, replace=params.replace, about=about
    )
    return listing.registered(entry).to_wire()


async def taken(_call: Call, params: TakenParams) -> list[dict[str, Any]]:
    """Which names new models cannot have because of others, and why.

    Raises:
        BridgeError: ``invalid_option`` for what no model can be called
    """
    return await asyncio.to_thread(_taken, params)


def _taken(params: TakenParams) -> list[dict[str, Any]]:
    from vllm_bridge.registry import find
    from vllm_bridge.registry.entry import check_word

    found: list[dict[str, Any]] = []
    for name, label, path in params.names:
        check_word(name, "name")
        if label is not None:
            check_word(label, "label")
        full = name if label is None else f"{name}:{label}"
        if (holder := find.holder(name, label)) is not None:
            found.append({"name": full, "by": holder.what, "delete": holder.name})
        elif os.path.exists(path):
            found.append({"name": full, "by": f"`{path}`", "delete": None})
    return found


async def alias(_call: Call, params: AliasParams) -> None:
    """Gives a model another name."""
    from vllm_bridge.registry import edit

    await asyncio.to_thread(edit.alias, params.model, params.name, replace=params.replace)


async def unregister(_call: Call, params: UnregisterParams) -> dict[str, Any]:
    """Takes a name away, and the files of what was made or downloaded here."""
    freed, names = await asyncio.to_thread(_unregister, params)
    return {"freed": freed, "names": names}


def _unregister(params: UnregisterParams) -> tuple[int, list[str]]:
    from vllm_bridge.hub import cache
    from vllm_bridge.registry import edit, find, listing
    from vllm_bridge.registry.entry import IN_PLACE

    if params.path is not None and not find.is_at(params.name, params.path):
        raise edit.unknown(params.name)
    if find.is_alias(params.name):
        return edit.unregister(params.name)
    where = {"download_dir": params.download_dir}
    model = listing.model(params.name, where)
    if not params.force:
        listing.check_unused(model, params.in_use)
    if model.origin == "hub":
        return cache.delete(model.name, where), [model.name]
    if model.origin == IN_PLACE:
        return edit.delete_in_place(model.name, is_forced=params.force)
    return edit.unregister(model.name)


METHODS: dict[str, Any] = {
    "registered": (RegisteredParams, registered),
    "register": (RegisterParams, register),
    "unregister": (UnregisterParams, unregister),
    "taken": (TakenParams, taken),
    "alias": (AliasParams, alias),
    "push": (PushParams, push),
}
