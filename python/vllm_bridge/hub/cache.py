"""The folder of downloaded models, which is ``huggingface_hub``'s: its layout is described at
https://huggingface.co/docs/huggingface_hub/guides/manage-cache.

    models--OWNER--NAME/
        blobs/        the files, by what is in them; ``….incomplete`` while they are on the way
        snapshots/    a folder for each commit, with links to them by their names
        refs/         the commit that each branch was last seen at
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vllm_bridge import json_files
from vllm_bridge.checkpoints import gguf_model
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.hub import errors

INCOMPLETE: Final = ".incomplete"
_MODELS: Final = "models--"


@dataclasses.dataclass(frozen=True)
class Model:
    """A downloaded model.

    Args:
        id: ``owner/name``
        size: what it takes on the disk, in bytes, all revisions together
        incomplete: how much of that is files that are not whole yet
        last_used: when one of its files was last read or written, in seconds since 1970
        revisions: the branches and tags that it was asked by, with their commits; commits that were
            asked by themselves stand for themselves
        method: by which it is quantized, as far as its config tells; ``gguf`` for GGUF files
        path: the folder of its newest snapshot; None where there is none yet
    """

    id: str
    size: int
    incomplete: int
    last_used: float
    revisions: Mapping[str, str]
    method: str | None
    path: str | None

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def folder(options: Mapping[str, Any]) -> str:
    """Where models are downloaded to.

    Raises:
        BridgeError: ``invalid_option`` for a ``download_dir`` that is no path
    """
    from huggingface_hub import constants

    given = options.get("download_dir") or constants.HF_HUB_CACHE
    if not isinstance(given, str) or "\0" in given:
        raise BridgeError(
            "invalid_option",
            "`download_dir` is no path of a folder.",
            {"option": "download_dir", "value": repr(given)},
            remedy="Name the folder that models are to be downloaded to, or leave it out.",
        )
    return os.path.abspath(os.path.expanduser(given))


def storage(name: str, options: Mapping[str, Any]) -> str:
    """The folder of a repository."""
    return os.path.join(folder(options), _MODELS + name.replace("/", "--"))


def snapshot(name: str, revision: str, options: Mapping[str, Any]) -> tuple[str, str] | None:
    """The commit that a revision was last seen at, and the folder of its files, where they are
    here."""
    here = storage(name, options)
    for commit in (_read(os.path.join(here, "refs", revision)), revision):
        path = os.path.join(here, "snapshots", commit or "")
        if commit and os.path.isdir(path):
            return commit, path
    return None


def seen(path: str) -> tuple[str, str] | None:
    """The repository and the commit of a folder of downloaded files; None for any other folder."""
    parts = path.split(os.sep)
    for name, middle, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if name.startswith(_MODELS) and middle == "snapshots":
            return name.removeprefix(_MODELS).replace("--", "/"), commit
    return None


def remember(name: str, revision: str, commit: str, options: Mapping[str, Any]) -> None:
    """Writes down what commit a revision is at, for when the hub does not answer, if its files are
    here."""
    here = storage(name, options)
    path = os.path.join(here, "refs", revision)
    if not os.path.isdir(os.path.join(here, "snapshots", commit)):
        return
    if revision == commit or _read(path) == commit:
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    new = os.path.join(here, f"ref.{os.getpid()}")
    with open(new, "w", encoding="utf-8") as file:
        file.write(commit)
    os.replace(new, path)


def files_in(path: str) -> Iterator[str]:
    """The paths of the files in a snapshot that are there."""
    for parent, _, names in os.walk(path):
        for name in sorted(names):
            file = os.path.join(parent, name)
            if os.path.isfile(file):
                yield file


def models(options: Mapping[str, Any]) -> list[Model]:
    """What was downloaded, the last used first; also what was begun.

    Args:
        options: of which ``download_dir`` counts

    Raises:
        BridgeError: ``cache_not_writable`` if the folder may not be read
    """
    root = folder(options)
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BridgeError(
            "cache_not_writable",
            f"`{root}` cannot be read ({error.strerror}).",
            {"folder": root},
            remedy="It is the folder of downloaded models, which `download_dir` or `HF_HOME` "
            "names: give one that you may use.",
        ) from error
    found = (_model(root, name) for name in names if name.startswith(_MODELS))
    return sorted((one for one in found if one is not None), key=lambda one: -one.last_used)


def delete(name: str, options: Mapping[str, Any], revision: str | None = None) -> int:
    """Removes a downloaded model, or one revision of it, with what no other revision needs.

    Args:
        name: ``owner/name``
        options: of which ``download_dir`` counts

    Returns:
        int: how many bytes that freed

    Raises:
        BridgeError: ``model_not_found`` if it was not downloaded, ``cache_not_writable``
    """
    from huggingface_hub import scan_cache_dir

    known = {model.id: model for model in models(options)}
    if name not in known:
        meant = nearest(name, known)
        raise BridgeError(
            "model_not_found",
            f"`{name}` is not among the downloaded models of `{folder(options)}`.",
            {"model": name, "nearest": meant},
            remedy=did_you_mean(meant) + "`mix vllm.models` lists them.",
        )
    revisions = known[name].revisions
    if revision is not None and revision not in {*revisions, *revisions.values()}:
        raise BridgeError(
            "model_not_found",
            f"`{name}` was not downloaded at the revision `{revision}`.",
            {"model": name, "revision": revision},
            remedy=f"Give one of those that it was: {', '.join(sorted(revisions)) or 'none'}.",
        )
    with errors.told(name):
        if revision is None:
            commits = set(revisions.values())
        else:
            commits = {revisions.get(revision, revision)}
        # The client knows what revisions and repositories share.
        scanned = scan_cache_dir(folder(options))
        present = {one.commit_hash for repo in scanned.repos for one in repo.revisions}
        scanned.delete_revisions(*commits & present).execute()
        if revision is None and os.path.isdir(storage(name, options)):
            shutil.rmtree(storage(name, options))
    left = {model.id: model.size for model in models(options)}
    return known[name].size - left.get(name, 0)


def _model(root: str, folder_name: str) -> Model | None:
    path = os.path.join(root, folder_name)
    size = incomplete = 0
    last_used = 0.0
    for file in _scan(os.path.join(path, "blobs")):
        try:
            stat = file.stat()
        except OSError:
            continue  # it was finished or removed a moment ago
        size += stat.st_size
        incomplete += stat.st_size if file.name.endswith(INCOMPLETE) else 0
        last_used = max(last_used, stat.st_atime, stat.st_mtime)
    snapshots = {one.name: one.path for one in _scan(os.path.join(path, "snapshots"))}
    if not size and not snapshots:
        return None
    refs = {name: commit for name, commit in _refs(path) if commit in snapshots}
    alone = {commit: commit for commit in snapshots if commit not in refs.values()}
    newest = max(snapshots.values(), key=os.path.getmtime, default=None)
    return Model(
        id=folder_name.removeprefix(_MODELS).replace("--", "/"),
        size=size,
        incomplete=incomplete,
        last_used=last_used,
        revisions=refs | alone,
        method=_method(newest) if newest else None,
        path=newest,
    )


def _refs(path: str) -> Iterator[tuple[str, str]]:
    refs = os.path.join(path, "refs")
    for file in files_in(refs):
        yield os.path.relpath(file, refs), _read(file) or ""


def _method(path: str) -> str | None:
    if any(map(gguf_model.is_model, files_in(path))):
        return "gguf"
    try:
        config = json_files.read(os.path.join(path, "config.json"))
    except (OSError, ValueError):
        return None
    return Checkpoint(config=config).quant_method


def _scan(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None
