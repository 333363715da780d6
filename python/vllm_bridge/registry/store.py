"""The files of the registry."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from vllm_bridge import data
from vllm_bridge.errors import BridgeError
from vllm_bridge.registry.entry import Entry, Names

logger = logging.getLogger(__name__)

_SUFFIX: Final = ".json"
_NEW: Final = ".new"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def read(name: str) -> Names | None:
    """What is known of a name; None where nothing is.

    Raises:
        BridgeError: ``invalid_checkpoint`` where its file is damaged
    """
    root = data.folder()
    if root is None:
        return None
    path = os.path.join(root, "registry", name + _SUFFIX)
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(), type=Names)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BridgeError(
            "invalid_checkpoint",
            f"What is known of `{name}` cannot be read from `{path}`: {error}.",
            {"model": name, "file": path},
            remedy="Delete that file, and register the model again.",
        ) from error
    outputs = [_moved(one, root, os.path.join) for one in found.outputs]
    return msgspec.structs.replace(found, outputs=outputs)


def every() -> list[Names]:
    """What is known of all names, in their order; damaged files are left out, and told in the
    log."""
    root = data.folder()
    if root is None:
        return []
    try:
        files = sorted(os.listdir(os.path.join(root, "registry")))
    except OSError:
        return []
    found = []
    for file in files:
        if file.endswith(_SUFFIX) and not file.startswith("."):
            try:
                names = read(file.removesuffix(_SUFFIX))
            except BridgeError as error:
                logger.warning("%s", error)
            else:
                found += [names] if names is not None else []
    return found


class Change:
    """The registry while nobody else changes it; see ``changing``."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._trash = os.path.join(root, "trash")
        self._files = os.path.join(root, "registry")

    def write(self, names: Names) -> None:
        """Notes what is known of a name; where nothing is left of it, that it is none any more."""
        path = os.path.join(self._files, names.name + _SUFFIX)
        if not names.outputs and names.alias_of is None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        kept = [_moved(one, self.root, _below) for one in names.outputs]
        text = msgspec.json.format(
            msgspec.json.encode(msgspec.structs.replace(names, outputs=kept)), indent=2
        )
        new = os.path.join(self._files, "." + names.name + _NEW)
        with open(new, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        folder = os.open(self._files, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self, path: str) -> str:
        """Takes a folder out of its place, from one moment to the next, and returns where it is
        until ``sweep``."""
        os.makedirs(self._trash, exist_ok=True)
        gone = os.path.join(self._trash, f"{os.getpid()}-{os.path.basename(path)}")
        os.rename(path, gone)
        with contextlib.suppress(OSError):  # of its name, where it was the last output
            os.rmdir(os.path.dirname(path))
        return gone

    def sweep(self) -> None:
        """Removes what was discarded, also by one who was killed then, and files that were never
        renamed."""
        shutil.rmtree(self._trash, ignore_errors=True)
        for file in os.listdir(self._files):
            if file.startswith(".") and file.endswith(_NEW):
                os.unlink(os.path.join(self._files, file))


@contextlib.contextmanager
def changing() -> Iterator[Change]:
    """The right to change the registry, which one process has at a time.

    Raises:
        BridgeError: ``cache_not_writable`` or ``disk_full``
    """
    root = data.required()
    files = os.path.join(root, "registry")
    try:
        os.makedirs(files, exist_ok=True)
        with open(os.path.join(files, ".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            change = Change(root)
            change.sweep()
            yield change
            change.sweep()
    except OSError as error:
        raise unwritten(error, root) from error


def is_made_here(path: str) -> bool:
    """Whether a path is that of an output of a job, which is ours to delete."""
    root = data.folder()
    return root is not None and _below(root, path).startswith("models" + os.sep)


def _moved(entry: Entry, root: str, move: Callable[[str, str], str]) -> Entry:
    return msgspec.structs.replace(entry, path=move(root, entry.path))


def _below(root: str, path: str) -> str:
    """A path as seen from the data folder, where it is in there."""
    return path.removeprefix(root + os.sep)


def unwritten(error: OSError, root: str) -> BridgeError:
    """The error for what could not be written below the data folder."""
    details = {"folder": root, "exception": f"{type(error).__name__}: {error}"}
    if error.errno in _FULL:
        return BridgeError(
            "disk_full",
            f"The disk of `{root}`, or the quota on it, is full.",
            details,
            remedy="Delete models that are not needed (`mix vllm.models`).",
        )
    return BridgeError(
        "cache_not_writable",
        f"`{error.filename or root}` cannot be written to ({error.strerror}).",
        details,
        remedy="Models and their names are kept in the folder that `config :ex_vllm, data_dir:` "
        "names: give one that you may write to.",
    )
