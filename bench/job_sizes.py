"""Holds what `VLLM.Job.estimate` foresees against what jobs took: disk, memory and time.

    PYTHON bench/job_sizes.py [--measure MODEL ...] [--formats FORMAT ...] [--job MODEL LABEL]

with the Python of the library's environment (`mix vllm.doctor` names it). Prints a table of the
runs that bench/job_sizes.json has. With `--measure`, and in an environment that quantizes as well
(`mix vllm.setup --with quantize`), it first makes these of its models (all where none is named)
with random weights, and outputs of them (of these formats only, where some are named), each in a
process of its own with one thread, and puts what they took into that file: seconds of a processor,
which other processes do not change, and seconds on the clock with how busy the machine was. All
takes an hour on two idle cores.

Its "jobs" are whole ones, with their verification: what all their processes and the BEAM took in a
control group of their own (cpuacct), with `threads: 1`. `--job` runs `mix vllm.quantize` for one
more, of an output of the recorded runs that reads no texts; it needs root, for the group.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "python" / "tests")]

import headers  # noqa: E402
from producing import DEMO, interpreter, produce  # noqa: E402
from vllm_bridge import machine  # noqa: E402
from vllm_bridge.checkpoints import models  # noqa: E402
from vllm_bridge.checkpoints.checkpoint import Checkpoint  # noqa: E402
from vllm_bridge.jobs import foreseen  # noqa: E402
from vllm_bridge.jobs.foreseen import Machine  # noqa: E402
from vllm_bridge.jobs.quantize import estimate  # noqa: E402

RECORDED = Path(__file__).with_suffix(".json")

OUTPUTS: list[tuple[str, Any]] = [
    ("gguf", "Q4_K_M"), ("gguf", "Q8_0"), ("bitsandbytes", "nf4"), ("bitsandbytes", "int8"),
    ("hqq", "4bit"), ("torchao", "int8"), ("compressed-tensors", "FP8_DYNAMIC"),
    ("compressed-tensors", {"scheme": "W4A16", "algorithm": "rtn"}),
    ("compressed-tensors", "W4A16"), ("gptq", "4bit"), ("awq", "4bit"),
]  # fmt: skip

# These read texts, with which it takes minutes for each of the larger models, which read fewer.
CALIBRATED: list[tuple[str, Any]] = OUTPUTS[-3:]
LARGE = ("522 M", "494 M")

TEXTS = [f"The {number}th of many sentences, {'and some more words ' * 12}" for number in range(16)]

# Run in the environment that quantizes, which has no vLLM in its way.
MAKE = """
import json, shutil, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
demo, out, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig.from_pretrained(demo)
config.update({**sizes, "head_dim": 64})
shutil.copytree(demo, out, ignore=shutil.ignore_patterns("*.safetensors"))
LlamaForCausalLM(config).save_pretrained(out)
"""


def checkpoint_of(sizes: dict[str, Any] | None) -> Checkpoint:
    """The headers of a model of the recorded ones; of the demo model where it has no sizes."""
    if sizes is None:
        return models.check_model(str(DEMO), {})
    return headers.plain(headers.config(0, 0, 0, 0) | sizes, "BF16")


def seen(recorded: dict[str, Any], run: dict[str, Any], here: Machine) -> foreseen.Foreseen:
    """What is foreseen of a run."""
    checkpoint = checkpoint_of(recorded["models"][run["model"]])
    asked = [(run["format"], run["options"], run["tokens"])]
    return estimate.of(checkpoint, run["model"], asked, here)[0]


def whole(recorded: dict[str, Any], job: dict[str, Any], here: Machine) -> foreseen.Foreseen:
    """What is foreseen of a whole job."""
    checkpoint = checkpoint_of(recorded["models"][job["model"]])
    each = estimate.of(checkpoint, job["model"], job["outputs"], here)
    return foreseen.together(each, estimate.verification(checkpoint, len(each), here))


def measure(names: list[str], wanted: list[str], recorded: dict[str, Any]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for name in names or recorded["models"]:
        with tempfile.TemporaryDirectory() as folder:
            path = _model(recorded["models"][name], Path(folder))
            for form, options in OUTPUTS:
                if wanted and form not in wanted:
                    continue
                is_read = (form, options) in CALIBRATED
                few = TEXTS[:4] if name in LARGE else TEXTS
                texts = {"calibration": {"texts": few}} if is_read else {}
                run = {"model": name, **_made(form, options, Path(folder), path, texts)}
                _replace(recorded["runs"], run)
                RECORDED.write_text(_text(recorded), encoding="utf-8")


def _model(sizes: dict[str, Any] | None, folder: Path) -> Path:
    """One with random weights of these sizes; the demo model where there are none."""
    if sizes is None:
        return DEMO
    path = folder / "model"
    command = [interpreter(), "-c", MAKE, DEMO, path, json.dumps(sizes)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def measure_job(name: str, label: str, recorded: dict[str, Any]) -> None:
    runs = {(run["model"], run["label"]): run for run in recorded["runs"] if not run["tokens"]}
    run = runs[name, label]
    with tempfile.TemporaryDirectory() as folder, _group() as group:
        path = _model(recorded["models"][name], Path(folder))
        enter: list[str | Path] = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', group]
        asked = ["--to", f"{run['format']}:{label}", "--name", "made", "--threads", "1"]
        subprocess.run(
            [*enter, "mix", "vllm.quantize", path, *asked],
            check=True,
            cwd=ROOT,
            env=os.environ | {"XDG_DATA_HOME": folder},
        )
        nanoseconds = int((group / "cpuacct.usage").read_text())
    job = {
        "model": name,
        "labels": [label],
        "outputs": [[run["format"], run["options"], 0]],
        "cpu_seconds": round(nanoseconds / 1e9, 1),
    }
    recorded["jobs"][:] = [
        one for one in recorded["jobs"] if (one["model"], one["labels"]) != (name, [label])
    ] + [job]
    RECORDED.write_text(_text(recorded), encoding="utf-8")


@contextmanager
def _group() -> Iterator[Path]:
    """A control group that counts what its processes take of the processors."""
    group = Path(f"/sys/fs/cgroup/cpuacct/job-sizes-{os.getpid()}")
    group.mkdir()
    try:
        yield group
    finally:
        group.rmdir()


def _made(
    form: str, options: Any, folder: Path, path: Path, texts: dict[str, Any]
) -> dict[str, Any]:
    share = foreseen.share(machine.cores(), os.getloadavg()[0], nice=0)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        (told,) = produce([(form, options)], Path(out), path, **texts).values()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {
        "format": form,
        "label": told["label"],
        "options": told["options"],
        "tokens": (told["calibration"] or {}).get("tokens") or 0,
        "bytes": told["bytes"],
        "memory": told["peak_memory_bytes"],
        "cpu_seconds": round(cpu, 1),
        "seconds": round(time.monotonic() - began, 1),
        "share": round(share, 3),
    }


def _replace(runs: list[dict[str, Any]], run: dict[str, Any]) -> None:
    def key(one: dict[str, Any]) -> Any:
        return one["model"], one["label"]

    runs[:] = [one for one in runs if key(one) != key(run)] + [run]


def _text(recorded: dict[str, Any]) -> str:
    """JSON with a run on each line."""
    known = json.dumps(recorded["models"])
    runs, jobs = (
        ",\n".join(f"    {json.dumps(one)}" for one in recorded[name]) for name in ("runs", "jobs")
    )
    return f'{{\n  "models": {known},\n  "runs": [\n{runs}\n  ],\n  "jobs": [\n{jobs}\n  ]\n}}\n'


def table(recorded: dict[str, Any]) -> str:
    lines = [
        "| model | output | disk | foreseen | peak of memory | foreseen | CPU seconds | foreseen |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in recorded["runs"]:
        found = seen(recorded, run, Machine())
        fast, slow = (60 * minutes for minutes in found.minutes)
        lines.append(
            f"| {run['model']} | {run['label']} | {run['bytes'] / 1e6:.2f} MB "
            f"| {found.bytes / run['bytes'] - 1:+.1%} | {run['memory'] / 2**20:.0f} MiB "
            f"| {found.memory / run['memory'] - 1:+.0%} "
            f"| {run['cpu_seconds']:.0f} | {fast:.0f} to {slow:.0f} |"
        )
    lines += ["", "| model | whole job | CPU seconds | foreseen |", "| --- | --- | ---: | ---: |"]
    for job in recorded["jobs"]:
        fast, slow = (60 * minutes for minutes in whole(recorded, job, Machine()).minutes)
        labels = ", ".join(job["labels"])
        lines.append(
            f"| {job['model']} | {labels} | {job['cpu_seconds']:.0f} | {fast:.0f} to {slow:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--measure", nargs="*", metavar="MODEL")
    arguments.add_argument("--formats", nargs="*", metavar="FORMAT", default=[])
    arguments.add_argument("--job", nargs=2, metavar=("MODEL", "LABEL"))
    asked = arguments.parse_args()
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    if asked.measure is not None:
        measure(asked.measure, asked.formats, recorded)
    if asked.job:
        name, label = asked.job
        measure_job(name, label, recorded)
    print(table(recorded))


if __name__ == "__main__":
    main()
