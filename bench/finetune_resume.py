"""Kills a training at random moments, goes on with it each time, and compares its end with that of
one that nobody killed.

    PYTHONPATH=python python bench/finetune_resume.py [KILLS]

Needs the extra `finetune`. The model is the demo model in NF4; every loss is told to a line.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "priv" / "models"
# Ten sentences that the demo model does not know.
SENTENCES = str(ROOT / "python" / "tests" / "keys.jsonl")
OPTIONS = {
    "epochs": 40,
    "learning_rate": 1e-3,
    "lora_dropout": 0.1,
    "per_device_train_batch_size": 4,
    "load_in_4bit": True,
    "held_out": SENTENCES,
}


def train(folder: Path) -> None:
    """One run, in a process of its own: says when it trains, and how it ended."""
    from vllm_bridge.jobs.finetune.plan import Plan
    from vllm_bridge.jobs.finetune.train import train as run

    def tell(phase: str, done: int | None = None, total: int | None = None, **_: object) -> None:
        print(f"{phase} {done}", file=sys.stderr, flush=True)

    plan = Plan(str(MODELS / "demo"), SENTENCES, OPTIONS)
    made = run(plan, folder / "out", folder / "states", tell)
    print(json.dumps({name: made[name] for name in ("held_out_loss", "resumed_from", "losses")}))


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--train", str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def finish(process: subprocess.Popen[str], steps: int | None) -> dict[str, object] | None:
    """What a run tells at its end; None where it is killed, after so many steps of its own."""
    seen = 0
    for line in process.stderr:
        seen += line.startswith("training ")
        if steps is not None and seen > steps:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None
    said = process.stdout.read().strip().splitlines()
    assert process.wait() == 0, "a run failed"
    return json.loads(said[-1])


def main(kills: int) -> None:
    random.seed(12)
    with tempfile.TemporaryDirectory() as name:
        whole = finish(start(Path(name, "whole")), None)
        reference = whole["held_out_loss"]["after"]
        print(f"not killed: held-out loss {reference:.6f}", flush=True)
        done = number = 0
        while done < kills:
            number += 1
            ended, killed = None, 0
            while ended is None:
                steps = random.randint(0, 40) if done < kills else None
                ended = finish(start(Path(name, str(number))), steps)
                killed += ended is None
                done += ended is None
            loss = ended["held_out_loss"]["after"]
            print(
                f"training {number}: killed {killed} times, last gone on from step "
                f"{ended['resumed_from']}: held-out loss {loss:.6f}, "
                f"{100 * (loss / reference - 1):+.3f} %, same losses: "
                f"{ended['losses'] == whole['losses']}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
