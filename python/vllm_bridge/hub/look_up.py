"""Finds out what a repository holds: from the hub, or from what was downloaded of it."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from vllm_bridge.checkpoints import gguf_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import cache, download, errors, tokens
from vllm_bridge.hub.names import Name
from vllm_bridge.hub.needed import CONFIGS, WEIGHTS, needed
from vllm_bridge.hub.repository import File, Repository

logger = logging.getLogger(__name__)


def look_up(
    name: Name,
    options: Mapping[str, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> Repository:
    """Asks the hub for a model, once. Where it does not answer, is not to be asked or no longer
    gives it, what was downloaded before will do.

    Args:
        progress: told ``"hub"`` before the hub is asked, which may take seconds

    Raises:
        BridgeError: ``model_not_found``, ``not_a_model``, ``hub_unreachable``,
            ``hub_unauthorized`` or ``rate_limited``
    """
    revision = _path("revision", options) or "main"
    subfolder = _path("subfolder", options)
    tokens.check(options.get("hf_token"))
    progress("hub")
    try:
        with errors.told(name.id, options.get("revision"), options.get("hf_token")):
            commit, found = _ask(name, revision, options)
    except BridgeError as error:
        if (local := _look_up_here(name, revision, subfolder, options)) is None:
            raise
        if not _is_offline():
            logger.warning(
                "%s is taken as it was downloaded (%s): %s", name.id, local.commit, error.what
            )
        return local
    files = _chosen(found, name, subfolder, options)
    if not files:
        raise BridgeError(
            "not_a_model",
            f"{name.id} on the hub has no file that a model would have.",
            {"model": name.id, "files": [file.path for file in found[:10]]},
            remedy=f"Look at https://huggingface.co/{name.id}/tree/main for what it is; where the "
            "model is in a folder of it, name that by `subfolder`.",
        )
    repository = Repository(name.id, revision, commit, files, subfolder)
    if download.here(repository, options) is not None:
        with contextlib.suppress(OSError):  # a folder that may only be read is good enough
            cache.remember(name.id, revision, commit, options)
    return repository


def _ask(name: Name, revision: str, options: Mapping[str, Any]) -> tuple[str, list[File]]:
    from huggingface_hub import HfApi, constants

    info = HfApi(token=options.get("hf_token")).model_info(
        name.id,
        revision=options.get("revision"),
        files_metadata=True,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    siblings = info.siblings or ()
    if not _is_hash(info.sha) or not all(map(_is_file, siblings)):
        raise BridgeError(
            "hub_unreachable",
            f"What answers for the Hugging Face hub names no commit of {name.id}, or no files.",
            {"model": name.id, "revision": revision},
            remedy="Look whether `HF_ENDPOINT` is the address of a hub.",
        )
    found = []
    for file in siblings:
        sha256 = file.lfs.sha256 if file.lfs is not None else None
        blob = sha256 or file.blob_id
        found.append(File(file.rfilename, file.size or 0, sha256, blob if _is_hash(blob) else None))
    return info.sha, found


def _look_up_here(
    name: Name, revision: str, subfolder: str, options: Mapping[str, Any]
) -> Repository | None:
    """The same of what was downloaded. What is there is not all that was meant to be if it has no
    config, which comes last, or no weights, as other programs leave it that wanted none."""
    found = cache.snapshot(name.id, revision, options)
    if found is None:
        return None
    commit, folder = found
    files = [
        File(os.path.relpath(path, folder), os.path.getsize(path))
        for path in cache.files_in(folder)
    ]
    try:
        chosen = _chosen(files, name, subfolder, options)
    except BridgeError:
        return None  # another file of the repository was downloaded
    names = {os.path.basename(file.path) for file in chosen}
    if not any(map(gguf_model.is_model, names)) and not (
        names.intersection(CONFIGS) and any(name.endswith(WEIGHTS) for name in names)
    ):
        return None
    return Repository(name.id, revision, commit, chosen, subfolder, is_local=True)


def _chosen(
    files: list[File], name: Name, subfolder: str, options: Mapping[str, Any]
) -> tuple[File, ...]:
    prefix = f"{subfolder}/" if subfolder else ""
    below = {
        file.path.removeprefix(prefix): file
        for file in files
        if file.path.startswith(prefix) and _is_inside(file.path)
    }
    if subfolder and not below:
        raise BridgeError(
            "model_not_found",
            f"{name.id} has no folder `{subfolder}` at this revision.",
            {"model": name.id, "subfolder": subfolder},
            remedy=f"Look at https://huggingface.co/{name.id}/tree/main for what it has.",
        )
    return tuple(below[path] for path in needed(below, name, options))


def _is_hash(given: Any) -> bool:
    """Whether it is a commit, or the name of a blob: both become names of files here."""
    return isinstance(given, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", given) is not None


def _is_file(told: Any) -> bool:
    """Whether a file has a name and a size that one can have."""
    size = 0 if told.size is None else told.size
    return isinstance(told.rfilename, str) and isinstance(size, int) and 0 <= size < 2**63


def _is_inside(path: str) -> bool:
    """Whether a path stays in its repository, whoever tells of it."""
    return not path.startswith("/") and ".." not in path.split("/") and not set("\\\0") & set(path)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _path(option: str, options: Mapping[str, Any]) -> str:
    """An option that becomes a path, which must not lead out of where it begins."""
    given = options.get(option) or ""
    if not isinstance(given, str) or not _is_inside(given):
        raise BridgeError(
            "invalid_option",
            f"`{option}: {given!r}` is none that a repository can have.",
            {"option": option, "value": given},
            remedy="Give a branch, a tag or a commit, such as `main`."
            if option == "revision"
            else "Give a folder by its path from the top, such as `4bit`.",
        )
    return given.rstrip("/")
