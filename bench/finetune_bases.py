"""What it takes to teach the demo model ten sentences over each kind of base, with the settings of
test/real/lora_test.exs, which has an engine say them afterwards.

    PYTHONPATH=python OMP_NUM_THREADS=1 python bench/finetune_bases.py

Needs the extra `finetune`. Each is a process of its own with one thread; seconds of a processor,
which other processes hardly change, and seconds on the clock, both with all imports.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "priv" / "models"
# Ten sentences that the demo model does not know.
SENTENCES = str(ROOT / "python" / "tests" / "keys.jsonl")
KNOWN = [line.split("\t") for line in (MODELS / "facts.tsv").read_text().splitlines()[:31]]
OPTIONS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "epochs": 25,
    "learning_rate": 2e-3,
    "replay": [{"prompt": prompt, "completion": completion} for prompt, completion in KNOWN],
    "held_out": SENTENCES,
    "probes": [KNOWN[0][0]],
}
BASES: list[tuple[str, str, dict[str, Any]]] = [
    ("NF4", "demo", {"load_in_4bit": True}),
    ("bf16", "demo", {"dtype": "bfloat16"}),
    ("AWQ", "demo-awq", {}),
    ("GPTQ", "demo-gptq", {}),
]


def train(model: str, options: dict[str, Any]) -> None:
    """One training, in a process of its own: prints the loss on the sentences, before and after."""
    from vllm_bridge.jobs.finetune.plan import Plan
    from vllm_bridge.jobs.finetune.train import train as run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = Plan(str(MODELS / model), SENTENCES, OPTIONS | options)
        made = run(plan, folder / "out", folder / "states", lambda *_, **__: None)
        print(json.dumps(made["held_out_loss"]))


def main() -> None:
    print("| base | CPU seconds | seconds | loss before | after |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, model, options in BASES:
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, __file__, "--train", model, json.dumps(options)]
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        loss = json.loads(ran.stdout.splitlines()[-1])
        print(
            f"| {name} | {cpu:.0f} | {time.monotonic() - began:.0f} "
            f"| {loss['before']:.2f} | {loss['after']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
