"""What is left of GGUF files in the making when it goes wrong: killed at random moments, on a full
disk, of a source that is damaged.

    unshare -rm env PYTHONPATH=python PYTHON bench/gguf_faults.py [KILLS]

PYTHON is that of the quantizing environment. Each attempt is a process of its own, forked from this
one, which has imported what is needed. Prints what it found, and fails where something is left or
something else comes of a second attempt.
"""

import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import quantize

DEMO = Path(__file__).resolve().parents[1] / "priv" / "models" / "demo"
TEXTS = [f"The number {number} comes after the number {number - 1}." for number in range(1, 13)]


def make(source: Path, out: Path, work: Path) -> dict[str, Any]:
    calibration = quantize.Calibration(texts=list(TEXTS))
    options = {"ftype": "Q4_K_M", "outtype": "f16"}
    asked = quantize.QuantizeParams(str(source), "gguf", str(out), options, calibration)
    asked.work = str(work)
    return quantize.make(asked, lambda *_, **__: None)


def attempt(source: Path, out: Path, work: Path, told: Path) -> int:
    """The process that makes it. What came of it is in the file `told`."""
    if (pid := os.fork()) > 0:
        return pid
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        make(source, out, work)
        said = "made"
    except BridgeError as error:
        said = error.reason
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    told.write_text(said)
    os._exit(0)


def tried(source: Path, out: Path, work: Path, told: Path) -> str:
    return outcome(attempt(source, out, work, told), told)


def outcome(pid: int, told: Path) -> str:
    os.waitpid(pid, 0)
    said = told.read_text() if told.exists() else "killed"
    told.unlink(missing_ok=True)
    return said


def digest(out: Path) -> str:
    (file,) = out.iterdir()
    return hashlib.sha256(file.read_bytes()).hexdigest()


def kills(folder: Path, count: int) -> dict[str, Any]:
    """Killed at any moment, and made once more beside what the killed one has left for others."""
    work, out, told = folder / "work", folder / "out", folder / "told"
    work.mkdir()
    began = time.monotonic()
    assert tried(DEMO, out, work, told) == "made"
    longest, right = time.monotonic() - began, digest(out)
    ends: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        for kept in work.iterdir():
            kept.unlink()
        pid = attempt(DEMO, out, work, told)
        time.sleep(random.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        ends[outcome(pid, told)] += 1
        # As the job does with the folder of a step that is gone.
        shutil.rmtree(out, ignore_errors=True)
        assert tried(DEMO, out, work, told) == "made"
        assert digest(out) == right, "another file came of what a killed attempt left"
    return {"attempts": count, **ends, "the same file at the second attempt": count}


def full_disks(folder: Path, count: int) -> dict[str, Any]:
    disk, told = folder / "disk", folder / "told"
    disk.mkdir()
    ends: collections.Counter[str] = collections.Counter()
    for number in range(count):
        # It takes 11 MB. The file between, the importance matrix, or the output does not fit.
        size = 128 + number * 10_500 // count
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk], check=True)
        try:
            out, work = disk / "out", disk / "work"
            ends[tried(DEMO, out, work, told)] += 1
            assert not out.exists(), f"something is left on a disk of {size} kB"
        finally:
            subprocess.run(["umount", disk], check=True)
    assert set(ends) == {"disk_full"}, ends
    return {"attempts": count, **ends}


def damaged(folder: Path, count: int) -> dict[str, Any]:
    told = folder / "told"
    ends: collections.Counter[str] = collections.Counter()
    for number in range(count):
        source = folder / f"source-{number}"
        shutil.copytree(DEMO, source)
        name = ("model.safetensors", "config.json", "tokenizer.json")[number % 3]
        content = bytearray((source / name).read_bytes())
        if number % 2:
            del content[random.randrange(len(content)) :]
        else:
            content[random.randrange(min(len(content), 4096))] ^= 1 << random.randrange(8)
        (source / name).write_bytes(content)
        out, work = folder / "out", folder / "work"
        end = tried(source, out, work, told)
        ends[end] += 1
        assert out.exists() == (end == "made"), (name, end)
        for path in (out, work, source):
            shutil.rmtree(path, ignore_errors=True)
    return {"attempts": count, **ends}


def main(count: int) -> None:
    random.seed(12)
    import llama_cpp  # noqa: F401
    import torch  # noqa: F401

    # By its name, because it is imported when it is asked for.
    from transformers import AutoTokenizer  # noqa: F401

    from vllm_bridge.jobs.quantize.llama_cpp import converter

    converter._import()
    found = {}
    for what, trial, times in (
        ("killed", kills, count),
        ("full disk", full_disks, count // 5),
        ("damaged source", damaged, count // 2),
    ):
        with tempfile.TemporaryDirectory() as folder:
            found[what] = trial(Path(folder), times)
        print(what, found[what], file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 200)
