"""Everything that can be served on this machine: what has a name here, and what was downloaded."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from vllm_bridge import json_files
from vllm_bridge.checkpoints import adapter, detect
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.hub import cache
from vllm_bridge.registry import find, in_place, store
from vllm_bridge.registry.entry import IN_PLACE, Entry


@dataclasses.dataclass(frozen=True)
class Model:
    """What can be served.

    Args:
        name: as an engine takes it
        origin: ``made`` here by a job, quantized in place by a start that asked for it (``isq``), a
            ``local`` folder that was registered, or of the ``hub``
        last_used: when one of its files was last read or written, in seconds since 1970
        incomplete: how many bytes of it belong to files that are not whole yet
        revisions: of one of the hub: the branches and tags that it was asked by, with their commits
        aliases: its other names
        entry: what else is known of it
        path: None where no download of it has ended yet
    """

    name: str
    origin: str
    last_used: float | None
    entry: Entry
    path: str | None
    incomplete: int = 0
    revisions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        wire = {name: getattr(self.entry, name) for name in self.entry.__struct_fields__}
        return wire | {
            "name": self.name,
            "origin": self.origin,
            "path": self.path,
            "registered_at": self.entry.registered_at if self.origin != "hub" else None,
            "last_used": self.last_used,
            "incomplete": self.incomplete,
            "revisions": dict(self.revisions),
            "aliases": list(self.aliases),
            "missing": self.origin != "hub" and self.entry.is_missing,
        }


def models(options: Mapping[str, Any]) -> list[Model]:
    """All of them, the last used first.

    Args:
        options: of which ``download_dir`` counts

    Raises:
        BridgeError: ``cache_not_writable`` if the folder of downloaded models may not be read
    """
    names = store.every()
    aliases = {one.name: one.alias_of for one in names if one.alias_of is not None}
    found = [registered(entry) for one in names for entry in one.outputs]
    found += map(_in_place, in_place.names().outputs)
    found += map(_downloaded, cache.models(options))
    named = (_with_aliases(model, aliases) for model in found)
    return sorted(named, key=lambda one: (-(one.last_used or 0), one.name))


def model(name: str, options: Mapping[str, Any]) -> Model:
    """The one of a name, an alias, or a name of the hub.

    Raises:
        BridgeError: ``model_not_found``
    """
    known = models(options)
    found = find.find(name)
    if isinstance(found, Entry):
        return next(one for one in known if one.name == found.full_name)
    # Of a repository of GGUF files one is meant, and all of them are listed together.
    wanted = (found or name).partition(":")[0]
    for one in known:
        if one.origin == "hub" and one.name == wanted:
            return one
    every = [each for one in known for each in (one.name, one.entry.name, *one.aliases)]
    meant = nearest(name, every)
    raise BridgeError(
        "model_not_found",
        f"There is no model of the name `{name}` on this machine.",
        {"model": name, "nearest": meant},
        remedy=did_you_mean(meant) + "`mix vllm.models` lists them.",
    )


def check_unused(model: Model, in_use: Iterable[str]) -> None:
    """
    Args:
        in_use: models that engines serve, as these were named

    Raises:
        BridgeError: ``in_use`` where it is one of them
    """
    for name in in_use:
        try:
            found = find.find(name) or name
        except BridgeError:
            continue  # of an engine whose model has lost its name
        if isinstance(found, Entry):
            is_same = found.path == model.path
        else:
            is_same = found.partition(":")[0] == model.name
            is_same |= model.path is not None and f"{found}/".startswith(f"{model.path}/")
        if is_same:
            raise BridgeError(
                "in_use",
                f"An engine serves `{name}`, and would not start again without its files.",
                {"model": model.name, "engine_model": name},
                remedy="Stop it first (`VLLM.stop/1`). `VLLM.Models.delete/2` with `force: true` "
                "deletes it all the same.",
            )


def registered(entry: Entry) -> Model:
    """What has a name here."""
    origin = "made" if store.is_made_here(entry.path) else "local"
    used = max(_times(entry.path), default=None)
    return Model(entry.full_name, origin, used, entry, entry.path)


def _in_place(entry: Entry) -> Model:
    with contextlib.suppress(BridgeError):  # where it is deleted just now, or damaged
        seen = detect.detect(entry.path, {})
        entry = msgspec.structs.replace(entry, method=seen.method, bits=seen.bits)
    return dataclasses.replace(registered(entry), origin=IN_PLACE)


def _downloaded(model: cache.Model) -> Model:
    entry = Entry(
        name=model.id,
        path=model.path or "",
        kind="model",
        registered_at=0,
        size=model.size,
        method=model.method,
        source=model.id,
        revision=model.revisions.get("main") or min(model.revisions.values(), default=None),
    )
    if model.path is not None:
        entry = _seen(entry)
    return Model(
        model.id, "hub", model.last_used, entry, model.path, model.incomplete, model.revisions
    )


def _seen(entry: Entry) -> Entry:
    """The same, with what its config says, which costs no look at its weights."""
    try:
        config = json_files.read(os.path.join(entry.path, "config.json"))
    except (OSError, ValueError):
        if not os.path.exists(os.path.join(entry.path, adapter.CONFIG)):
            return entry
        try:
            base = adapter.read(entry.path).base_model
        except BridgeError:
            base = None
        return msgspec.structs.replace(entry, kind="adapter", base_model=base)
    told = detect.of(Checkpoint(config=config))
    return msgspec.structs.replace(entry, bits=told.bits, base_model=told.base_model)


def _with_aliases(model: Model, aliases: Mapping[str, str]) -> Model:
    """The same, with its other names; those of one GGUF file of a repository are the
    repository's."""
    is_hubs = model.origin == "hub"
    found = {
        alias
        for alias, target in aliases.items()
        if model.name == (target.partition(":")[0] if is_hubs else target)
    }
    return dataclasses.replace(model, aliases=tuple(sorted(found)))


def _times(path: str) -> Iterator[float]:
    """When the files of a model were read and written."""
    names = [path]
    if os.path.isdir(path):
        names = [one.path for one in os.scandir(path)]
    for name in names:
        try:
            stat = os.stat(name)
        except OSError:
            continue  # it went away a moment ago
        yield max(stat.st_atime, stat.st_mtime)
