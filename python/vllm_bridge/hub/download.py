"""Fetches the files of a model into the folder of downloaded models.

``huggingface_hub`` puts files there, but begins each from its first byte when a download was
killed. So its blobs are made here: under the client's own lock and name, one after the other, each
from where it was left, and each looked at before it gets its name. The client then finds them
there. A snapshot, which is what makes files a model for other programs, comes last, and its config
after all else in it.
"""

import dataclasses
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from vllm_bridge.hub import cache, errors, transfer
from vllm_bridge.hub.needed import CONFIGS
from vllm_bridge.hub.repository import File, Repository

# As many connections as the client has at once.
_AT_ONCE: Final = 8

# How often progress is told, in seconds, and over how many of them speed is measured.
_TICK: Final = 0.25
_WINDOW: Final = 10.0

# From this size on, a user who sets `HF_XET_HIGH_PERFORMANCE` gets the client's own way of fetching
# a file, which is faster where the network is, and begins anew after a kill.
_WORTHWHILE = 2**27


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a download is.

    Args:
        bytes: that are here, of ``total_bytes``
        files: that are whole, of ``total_files``
        bytes_per_second: of the last seconds; None at its beginning
        seconds_left: at that speed; None where it cannot be told
    """

    bytes: int
    total_bytes: int
    files: int
    total_files: int
    bytes_per_second: float | None = None
    seconds_left: float | None = None

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def here(repository: Repository, options: Mapping[str, Any]) -> str | None:
    """What to load where all files are here already: a folder, or a GGUF file."""
    folder = _snapshot(repository, options)
    if all(_is_whole(os.path.join(folder, file.path), file) for file in repository.files):
        return repository.model_in(folder)
    return None


def pull(
    repository: Repository,
    options: Mapping[str, Any],
    progress: Callable[[Progress], None] = lambda _: None,
) -> str:
    """Fetches what is not here yet.

    Args:
        options: of which ``hf_token`` and ``download_dir`` count
        progress: told a few times in a second how far it is, in the caller's thread

    Returns:
        str: what to load: a folder, or a GGUF file

    Raises:
        BridgeError: ``model_gated``, ``hub_unreachable``, ``hub_unauthorized``, ``rate_limited``,
            ``download_corrupt``, ``disk_full`` or ``cache_not_writable``; what came until then is
            kept, and the next call goes on from there
    """
    if path := here(repository, options):
        return path
    fetch(repository, repository.files, options, progress)
    with errors.told(repository.id, repository.revision, options.get("hf_token")):
        _place(repository, options)
    return repository.model_in(_snapshot(repository, options))


def fetch(
    repository: Repository,
    files: Sequence[File],
    options: Mapping[str, Any],
    progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Brings files here, which makes no model of them yet: ``where`` says where each is."""
    blobs = _blobs(repository, options)
    meter = _Meter(blobs, files)
    with errors.told(repository.id, repository.revision, options.get("hf_token")):
        os.makedirs(blobs, exist_ok=True)
        _check_space(blobs, meter)
        one = _Fetch(repository, options)
        at_once(files, one.run, one.stop, lambda: progress(meter.read()))
    progress(meter.read())


def where(repository: Repository, file: File, options: Mapping[str, Any]) -> str:
    """The path of a file that is here."""
    if file.blob is None:
        return os.path.join(_snapshot(repository, options), file.path)
    return os.path.join(_blobs(repository, options), file.blob)


def _blobs(repository: Repository, options: Mapping[str, Any]) -> str:
    return os.path.join(cache.storage(repository.id, options), "blobs")


class _Fetch:
    """Fetches one file at a time in each of several threads."""

    def __init__(self, repository: Repository, options: Mapping[str, Any]) -> None:
        self.stop = threading.Event()
        self._repository = repository
        self._options = options

    def run(self, file: File) -> None:
        from huggingface_hub.utils import WeakFileLock

        if not _is_ours(file):
            _by_client(self._repository, file, self._options)
            return
        path = where(self._repository, file, self._options)
        locks = os.path.join(
            cache.folder(self._options),
            ".locks",
            os.path.basename(cache.storage(self._repository.id, self._options)),
        )
        os.makedirs(locks, exist_ok=True)
        # The client's own, so that of several programs one fetches and the others wait for it.
        with WeakFileLock(os.path.join(locks, f"{file.blob}.lock")):
            if not _is_whole(path, file):
                if os.path.lexists(path):
                    os.unlink(path)
                self._make(path, file)

    def _make(self, path: str, file: File) -> None:
        part = path + cache.INCOMPLETE
        was_begun = _size(part) > 0
        self._fill(part, file)
        found = _digest(part, file)
        if found != file.blob and was_begun:
            # What was left there may have been written while the power went.
            os.unlink(part)
            self._fill(part, file)
            found = _digest(part, file)
        if found != file.blob:
            os.unlink(part)
            raise errors.corrupt(self._repository.id, file.path, f"the checksum {file.blob}", found)
        with open(part, "rb") as content:
            os.fsync(content.fileno())
        os.replace(part, path)

    def _fill(self, part: str, file: File) -> None:
        """Fetches what a file lacks."""
        transfer.patiently(lambda: self._append(part, file), lambda: _size(part), self.stop)
        if (found := _size(part)) > file.size:
            os.unlink(part)
            raise errors.corrupt(
                self._repository.id, file.path, f"{file.size} bytes", f"{found} or more"
            )

    def _append(self, part: str, file: File) -> None:
        # Without a buffer: what came is on the disk should this process be killed.
        with open(part, "ab", buffering=0) as out:
            start = out.tell()
            if start > file.size:
                start = out.truncate(0)
            if start == file.size:
                return
            for chunk in transfer.chunks(self._repository, file, self._options, start, file.size):
                if self.stop.is_set():
                    raise transfer.StoppedError
                rest = memoryview(chunk)
                while rest:
                    rest = rest[out.write(rest) :]


def _place(repository: Repository, options: Mapping[str, Any]) -> None:
    """Has the client link the files into a snapshot."""
    configs = [file for file in repository.files if os.path.basename(file.path) in CONFIGS]
    others = [file for file in repository.files if file not in configs]
    for files in (others, configs):
        at_once(files, lambda file: _by_client(repository, file, options), threading.Event())
    cache.remember(repository.id, repository.revision, repository.commit, options)


def _by_client(repository: Repository, file: File, options: Mapping[str, Any]) -> None:
    """Has the client put a file in its place; it fetches what is not here yet."""
    from huggingface_hub import hf_hub_download

    path = os.path.join(_snapshot(repository, options), file.path)
    if os.path.lexists(path) and not _is_whole(path, file):
        os.unlink(path)
    hf_hub_download(
        repository.id,
        file.path,
        revision=repository.commit,
        cache_dir=cache.folder(options),
        token=options.get("hf_token"),
    )


def _is_ours(file: File) -> bool:
    """Whether the client is not to fetch it: it can do more than we, in parts at once, and must for
    what is too large for one request. vLLM says for all that they want the client's way, so the
    user is asked himself."""
    from huggingface_hub import constants

    wish = os.environ.get("HF_XET_HIGH_PERFORMANCE", "")
    if file.blob is None or file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return False
    return file.size < _WORTHWHILE or wish.upper() not in constants.ENV_VARS_TRUE_VALUES


def _check_space(blobs: str, meter: "_Meter") -> None:
    now = meter.read()
    needed = now.total_bytes - now.bytes
    free = shutil.disk_usage(blobs).free
    if needed > free:
        raise errors.disk_full(blobs, needed, free)


class _Meter:
    """Tells progress by what is on the disk, so that it does not matter who fetches: this thread,
    the client or another program."""

    def __init__(self, blobs: str, files: Iterable[File]) -> None:
        self._blobs = blobs
        self._files = tuple(files)
        self._total = sum(file.size for file in self._files)
        self._samples: deque[tuple[float, int]] = deque()

    def read(self) -> Progress:
        found = self._on_disk()
        came = [min(found.get(file.blob or "", 0), file.size) for file in self._files]
        whole = [
            os.path.exists(os.path.join(self._blobs, file.blob or "?")) for file in self._files
        ]
        now, count = time.monotonic(), sum(came)
        while self._samples and self._samples[0][0] < now - _WINDOW:
            self._samples.popleft()
        self._samples.append((now, count))
        then, before = self._samples[0]
        speed = (count - before) / (now - then) if now - then >= _TICK else None
        left = (self._total - count) / speed if speed else None
        return Progress(count, self._total, sum(whole), len(self._files), speed, left)

    def _on_disk(self) -> dict[str, int]:
        """The bytes of each file by its blob, whole or not."""
        found: dict[str, int] = {}
        try:
            entries = list(os.scandir(self._blobs))
        except OSError:
            return found
        for entry in entries:
            name = entry.name.partition(".")[0]
            found[name] = max(found.get(name, 0), _size(entry.path))
        return found


def at_once(
    files: Iterable[File],
    run: Callable[[File], None],
    stop: threading.Event,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Runs something with each file, several at once. The first that fails stops the others, which
    are not waited for: they may hang in a connection.

    Args:
        stop: set when no more is to be begun
        tick: called now and then meanwhile, in the caller's thread
    """
    queue = deque(files)
    failed: list[Exception] = []

    def work() -> None:
        while not stop.is_set():
            try:
                file = queue.popleft()
            except IndexError:
                return
            try:
                run(file)
            except transfer.StoppedError:
                return
            except Exception as error:
                failed.append(error)
                stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(queue)))]
    for thread in threads:
        thread.start()
    try:
        while not failed and (alive := [thread for thread in threads if thread.is_alive()]):
            alive[0].join(_TICK)
            tick()
    finally:
        stop.set()
    if failed:
        raise failed[0]


def _digest(path: str, file: File) -> str:
    """What the hub calls what is in a file: its SHA-256, or git's hash of small ones."""
    with open(path, "rb") as content:
        if file.sha256 is not None:
            return hashlib.file_digest(content, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path), usedforsecurity=False)
        digest.update(content.read())
        return digest.hexdigest()


def _is_whole(path: str, file: File) -> bool:
    """Whether it is there with its size. What is in it was looked at when it came."""
    return os.path.isfile(path) and os.path.getsize(path) == file.size


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _snapshot(repository: Repository, options: Mapping[str, Any]) -> str:
    storage = cache.storage(repository.id, options)
    return os.path.join(storage, "snapshots", repository.commit)
