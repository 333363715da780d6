"""Runs the tests in processes side by side, forked when vLLM has been imported, which takes as long
as some hundred tests.

    python side_by_side.py PROCESSES FOLDER [OPTION...]

Each has a folder in FOLDER for what is temporary, and runs the files that no other has begun (see
``--share`` in ``conftest.py``). What they print is shown of one after another, that of those that
fail last; then the status is not 0.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_bridge import nursery, preload

# Of its plugins, which may be among what has been imported.
QUIET = "ignore::pytest.PytestAssertRewriteWarning"


def main(processes: int, folder: Path, options: list[str]) -> int:
    shared = folder / "shared"
    shared.mkdir()
    os.environ.update(preload.environment())
    # Not what is ours, of which conftest.py wraps some before it is imported.
    for name in nursery.MODULES:
        if name.startswith("vllm."):
            importlib.import_module(name)
    folders = {}
    for number in range(1, processes + 1):
        own = folder / str(number)
        own.mkdir()
        pid = os.fork()
        if pid == 0:
            return run(own, [f"--share={shared}", *options])
        folders[pid] = own
    failed = []
    while folders:
        pid, status = os.wait()
        own = folders.pop(pid)
        if status:
            failed.append(own)
        else:
            show(own)
    for own in failed:
        show(own)
    return min(len(failed), 1)


def run(folder: Path, options: list[str]) -> int:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return int(pytest.main(["-W", QUIET, f"--basetemp={folder / 't'}", *options]))


def show(folder: Path) -> None:
    print(f"== {folder.name}\n{(folder / 'log').read_text(errors='replace')}", flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
