"""The states that a training can go on from. A process may be killed while it writes one: those
that are whole have a mark, written last."""

import os
import shutil
from pathlib import Path
from typing import Final

_MARK: Final = "whole"
_PREFIX: Final = "checkpoint-"


def mark(folder: Path, step: int) -> None:
    """Says that the state of a step is wholly on disk."""
    state = folder / f"{_PREFIX}{step}"
    for path in state.rglob("*"):
        if path.is_file():
            _sync(path)
    (state / _MARK).touch()
    _sync(state)


def last(folder: Path) -> Path | None:
    """The newest that is whole; those that are not are removed."""
    states = sorted(folder.glob(f"{_PREFIX}*"), key=step_of)
    found = None
    for state in states:
        if (state / _MARK).exists():
            found = state
        else:
            shutil.rmtree(state, ignore_errors=True)
    return found


def step_of(state: Path) -> int:
    return int(state.name.removeprefix(_PREFIX))


def written(folder: Path) -> dict[str, int]:
    """The files of a folder with their sizes, once they are on the disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        _sync(path)
    return {path.name: path.stat().st_size for path in files}


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
