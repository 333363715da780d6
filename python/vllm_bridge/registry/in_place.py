"""Plain models that were quantized in place, by a start that asked for it (``engine/isq.py``).

    <data>/isq/KEY/         what was made, with what is known of it in ``quantize.json``
    <data>/isq/KEY.tmp/     while it is made
    <data>/isq/KEY.lock     held by who makes it, and together by those who use it

They have names, too: ``isq:KEY``. Locks are given back by the end of their holder, however it ends.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any, Final

from vllm_bridge import data, json_files
from vllm_bridge.errors import BridgeError
from vllm_bridge.registry import store
from vllm_bridge.registry.entry import IN_PLACE, Entry, Names

# What is known of one, in its folder.
MADE: Final = "quantize.json"

# After so many seconds without a start that used it one is swept.
UNUSED: Final = 30 * 24 * 3600

# What says that something may not be written: of another user, or of a disk that is read only.
_REFUSED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)

# How often is tried what several try at once, in seconds.
_RETRY: Final = 0.02

# Those that this process uses, with their locks.
_held: Final[dict[str, Any]] = {}


def folder() -> str:
    """Where they are.

    Raises:
        BridgeError: ``unsupported`` where nobody said where the data folder is
    """
    return os.path.join(data.required(), IN_PLACE)


def names() -> Names:
    """Those that there are, as outputs of one name."""
    root = data.folder()
    paths = sorted(glob.glob(os.path.join(glob.escape(root), IN_PLACE, "*", MADE))) if root else []
    found = []
    for path in map(os.path.dirname, paths):
        # One may be swept while it is looked at.
        with contextlib.suppress(FileNotFoundError):
            if not path.endswith(".tmp"):
                found.append(_entry(path))
    return Names(name=IN_PLACE, outputs=found)


def told(path: str) -> dict[str, Any]:
    """What is known of one; nothing where that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return json_files.read(os.path.join(path, MADE))
    return {}


def _entry(path: str) -> Entry:
    known = told(path)
    of = known.get("of", {})
    how = {name: known[name] for name in ("options", "libraries", "notes") if name in known}
    return Entry(
        name=IN_PLACE,
        label=os.path.basename(path),
        path=path,
        kind="model",
        registered_at=of.get("at", 0),
        size=sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file()),
        method=of.get("format"),
        source=of.get("repository") or of.get("source"),
        revision=of.get("commit"),
        made=how | {"by": IN_PLACE},
    )


def hold(path: str) -> bool:
    """Keeps one from being deleted for as long as this process lives, and notes that it was used;
    as far as that can be done in a folder that others have made and only they write.

    Returns:
        bool: whether it is there; also of what is no model of this kind
    """
    root = data.folder()
    if root is None or os.path.dirname(path) != os.path.join(root, IN_PLACE) or path in _held:
        return os.path.exists(path)
    made = os.path.join(path, MADE)
    try:
        lock = _lock(path, fcntl.LOCK_SH)
    except (FileNotFoundError, PermissionError):
        return os.path.exists(made)
    try:
        os.utime(made)
    except OSError as error:
        if error.errno not in _REFUSED:
            lock.close()
            return False
    _held[path] = lock
    return True


@contextlib.contextmanager
def making(path: str, source: str, word: str) -> Iterator[str | None]:
    """The right to make one, which one process has at a time; it is held afterwards.

    Args:
        path: that it will have
        source: the folder that it is made of
        word: what it is made as

    Yields:
        str | None: an empty folder to make it in; None where another process has made it meanwhile

    Raises:
        BridgeError: ``cache_not_writable`` or ``disk_full``
    """
    if (lock := _begun(path)) is None:
        yield None
        return
    try:
        if os.path.exists(os.path.join(path, MADE)):
            yield None
        else:
            _sweep(source, word)
            with _emptied(f"{path}.tmp") as empty:
                yield empty
        fcntl.flock(lock, fcntl.LOCK_SH)
    except BaseException:
        lock.close()
        raise
    _held[path] = lock


def _begun(path: str) -> Any:
    """The lock of one that nobody makes; None where another process has made it, and it is held."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # Who has made it shares the lock from then on: nobody waits to have it alone.
        while (lock := _alone(path)) is None:
            if hold(path):
                return None
            time.sleep(_RETRY)
    except OSError as error:
        raise store.unwritten(error, data.required()) from error
    return lock


def delete(path: str, *, is_forced: bool = False) -> int:
    """Deletes one.

    Args:
        is_forced: whether also where an engine uses it

    Returns:
        int: how many bytes that freed

    Raises:
        BridgeError: ``in_use``
    """
    size = _entry(path).size
    lock = _alone(path)
    if lock is None and not is_forced:
        name = _name(path)
        raise BridgeError(
            "in_use",
            f"An engine serves `{name}`, or is just making it.",
            {"model": name},
            remedy="Stop it first (`VLLM.stop/1`), or give `force: true`.",
        )
    with lock or contextlib.nullcontext():
        _remove(path)
    return size


def _sweep(source: str, word: str) -> None:
    """Removes what nobody uses now, and nobody will: what those have left that were killed while
    they made something, what is of the same folder and type as what is made next, because its files
    or the libraries are others now, and what was not used for long. What has another name stays."""
    named = {one.alias_of for one in store.every()}
    for file in glob.glob(os.path.join(glob.escape(folder()), "*.lock")):
        path = file.removesuffix(".lock")
        try:
            lock = _alone(path)
        except PermissionError:  # another user's
            continue
        if lock is None:
            continue
        with lock:
            shutil.rmtree(f"{path}.tmp", ignore_errors=True)
            is_named = _name(path) in named
            if not os.path.exists(path) or (not is_named and _is_old(path, source, word)):
                _remove(path)


def _name(path: str) -> str:
    return f"{IN_PLACE}:{os.path.basename(path)}"


def _is_old(path: str, source: str, word: str) -> bool:
    of = told(path).get("of", {})
    if (of.get("source"), of.get("word")) == (source, word):
        return True
    with contextlib.suppress(FileNotFoundError):
        return time.time() - os.stat(os.path.join(path, MADE)).st_mtime > UNUSED
    return True


def _remove(path: str) -> None:
    """Takes it out of its place from one moment to the next."""
    gone = f"{path}.tmp"
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}.lock")


def _alone(path: str) -> Any:
    """The lock of one that nobody uses or makes; None where somebody does."""
    try:
        return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def _lock(path: str, how: int) -> Any:
    """
    Raises:
        OSError: where it may not be written; who shares it needs one that is there
    """
    while True:
        file = _opened(f"{path}.lock", how)
        try:
            fcntl.flock(file, how)
            # Whoever had it before may have removed the file.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _opened(path: str, how: int) -> Any:
    try:
        return open(path, "w")
    except OSError as error:
        if error.errno not in _REFUSED or how != fcntl.LOCK_SH:
            raise
        return open(path)


@contextlib.contextmanager
def _emptied(path: str) -> Iterator[str]:
    """A folder with nothing in it, which is not there afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
