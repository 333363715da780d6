"""A model's repository on the hub, as a value."""

import dataclasses
import os
from typing import NamedTuple


class File(NamedTuple):
    """A file of a repository.

    Args:
        path: in the repository
        size: in bytes
        sha256: of what is in it; None for small files, which the hub has no such of
        blob: the name that it has among the downloaded ones: its SHA-256, or what git calls it;
            None where the hub does not tell
    """

    path: str
    size: int
    sha256: str | None = None
    blob: str | None = None


@dataclasses.dataclass(frozen=True)
class Repository:
    """A model of the hub.

    Args:
        id: ``owner/name``
        revision: the branch, tag or commit that was asked for
        commit: that it is at
        files: those that the model takes, small ones first
        subfolder: the folder in it that is the model's; empty for its top
        is_local: whether it was looked up among the downloaded ones, because the hub is not to be
            asked or does not answer
    """

    id: str
    revision: str
    commit: str
    files: tuple[File, ...]
    subfolder: str = ""
    is_local: bool = False

    @property
    def size(self) -> int:
        """Of all its files, in bytes."""
        return sum(file.size for file in self.files)

    def model_in(self, folder: str) -> str:
        """What to load, where ``folder`` holds the repository's files: a folder, or a GGUF file."""
        gguf = [file.path for file in self.files if file.path.endswith(".gguf")]
        return os.path.join(folder, gguf[0] if gguf else self.subfolder).rstrip("/")
