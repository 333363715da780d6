"""A model of the hub as a folder that has all of it but the weights.

Its small files are there. Its large ones are sparse: each is as long as it is on the hub, has the
header that says what is in it, and holes where the weights would be. So what reads headers of
models (``checkpoints``) reads a model of the hub as it reads one that is here.
"""

import atexit
import io
import os
import shutil
import struct
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Final

from vllm_bridge.checkpoints import gguf, gguf_config, gguf_model, headers, torch_files
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import download, errors, transfer
from vllm_bridge.hub.needed import WEIGHTS
from vllm_bridge.hub.repository import File, Repository

# What is fetched at once, at least: the headers of most safetensors files, and the directories of
# most files of torch's.
_BLOCK: Final = 2**17

# torch has the bytes of tensors begin at multiples of this, and fills up with at least so much.
_ALIGNMENT: Final = 64
_FILLER: Final = 4


# The ghosts of this process, each with the name of its model.
_made: dict[str, str] = {}


def of(repository: Repository, options: Mapping[str, Any]) -> str:
    """Makes a ghost, which is removed when this process ends.

    Returns:
        str: what to look at in the place of the model: a folder, or a GGUF file

    Raises:
        BridgeError: as ``download.pull`` does
    """
    folder = tempfile.mkdtemp(prefix="ghost-")
    _made[folder] = repository.id
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    large = [file for file in repository.files if file.path.endswith(WEIGHTS)]
    small = [file for file in repository.files if file not in large]
    download.fetch(repository, small, options)
    with errors.told(repository.id, repository.revision, options.get("hf_token")):
        for file in small:
            path = _room(folder, file)
            os.symlink(download.where(repository, file, options), path)
        download.at_once(
            large,
            lambda file: _header(_room(folder, file), repository, file, options),
            threading.Event(),
        )
    return repository.model_in(folder)


def named(error: BridgeError) -> BridgeError:
    """An error about a ghost, of which its user has never heard, as one about the model."""

    def told(value: Any) -> Any:
        if isinstance(value, str):
            for folder, name in _made.items():
                value = value.replace(folder, name)
        return value

    details = {key: told(value) for key, value in error.details.items()}
    return BridgeError(error.reason, told(error.what), details, told(error.remedy))


def _room(folder: str, file: File) -> str:
    path = os.path.join(folder, file.path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def _header(path: str, repository: Repository, file: File, options: Mapping[str, Any]) -> None:
    """Writes a file's header. One that is damaged is written as it is: the one who reads it says
    so."""
    with _Sparse(path, file.size, lambda a, b: _bytes(repository, file, options, a, b)) as sparse:
        if path.endswith(".safetensors"):
            (length,) = struct.unpack("<Q", sparse.read(8).ljust(8, b"\0"))
            sparse.need(0, 8 + min(length, headers.MAX_LENGTH))
        elif path.endswith(gguf_model.SUFFIX):
            try:
                found = gguf.read_one(path, io.BufferedReader(sparse, 1))
            except BridgeError:
                return
            for name in gguf_config.FACTORS:
                if (tensor := found.tensors.get(name)) is not None:
                    sparse.need(tensor.start, tensor.start + min(tensor.size, _BLOCK))
        else:
            _torch(sparse)


def _torch(sparse: "_Sparse") -> None:
    """Writes what ``checkpoints.torch_files`` looks at. In front of each tensor there is a header
    in which nothing is new but how long it is, and that is computed: there are hundreds."""
    try:
        with zipfile.ZipFile(sparse) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            for entry in entries:
                if entry.filename.endswith("/data.pkl"):
                    archive.read(entry)
            ends = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError):
        return
    for entry, end in zip(entries, ends, strict=True):
        name = len(entry.filename.encode())
        start = entry.header_offset + torch_files.ENTRY.size + name
        filler = -(start + _FILLER) % _ALIGNMENT + _FILLER
        if start + filler + entry.file_size > end:
            filler = 0  # torch did not write it
        header = torch_files.ENTRY.pack(torch_files.ENTRY_MAGIC, name, filler)
        sparse.put(entry.header_offset, header)


class _Sparse(io.RawIOBase):
    """A file of the hub's of which only what is read is fetched; the rest are holes."""

    def __init__(self, path: str, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed with this one
        self._file.truncate(size)
        self._size = size
        self._fetch = fetch
        self._here: set[int] = set()  # numbers of blocks

    def need(self, start: int, end: int) -> None:
        """Sees that these bytes are here."""
        end = min(end, self._size)
        missing = [
            number
            for number in range(start // _BLOCK, -(-end // _BLOCK))
            if number not in self._here
        ]
        if missing:
            first, last = missing[0], missing[-1]
            data = self._fetch(first * _BLOCK, min((last + 1) * _BLOCK, self._size))
            os.pwrite(self._file.fileno(), data, first * _BLOCK)
            self._here.update(range(first, last + 1))

    def put(self, at: int, data: bytes) -> None:
        """Writes what need not be fetched."""
        if at // _BLOCK not in self._here or (at + len(data) - 1) // _BLOCK not in self._here:
            os.pwrite(self._file.fileno(), data, at)

    def readinto(self, buffer: Any) -> int:
        at, size = self._file.tell(), len(buffer)
        self.need(at, at + size)
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _bytes(
    repository: Repository, file: File, options: Mapping[str, Any], start: int, end: int
) -> bytes:
    """Some bytes of a file on the hub."""
    data = bytearray()

    def more() -> None:
        for chunk in transfer.chunks(repository, file, options, start + len(data), end):
            data.extend(chunk)

    transfer.patiently(more, lambda: len(data), threading.Event())
    return bytes(data[: end - start])
