"""What engines answer, measured: greedy answers to all facts of the demo model, and the log
probability of every token of them.

The engines run one after another in one process of their own, which takes two seconds each:

    python exactness.py SPECS RESULTS

reads a JSON map of names and engine arguments and writes one of names and ``Measured``.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import inheriting

PYTHON = Path(__file__).resolve().parents[1]
MODELS = PYTHON.parent / "priv" / "models"
FACTS = MODELS / "facts.tsv"
ARGUMENTS = {"max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 2**26}


class Measured(NamedTuple):
    """What one engine answered.

    Args:
        wrong: the prompts whose answer is not the fact
        logprobs: of each token of each fact but the first, given those before it
    """

    wrong: list[str]
    logprobs: list[list[float]]

    def difference(self, other: "Measured") -> float:
        """The largest difference of two log probabilities."""
        return max(
            abs(one - two)
            for ours, theirs in zip(self.logprobs, other.logprobs, strict=True)
            for one, two in zip(ours, theirs, strict=True)
        )


def measure(specs: dict[str, dict[str, Any]], folder: Path) -> dict[str, Measured]:
    """Runs engines.

    Args:
        specs: the arguments of each, by a name
        folder: for files
    """
    folder.mkdir(parents=True, exist_ok=True)
    given, results = folder / "specs.json", folder / "results.json"
    given.write_text(json.dumps(specs))
    environment = os.environ | {
        "PYTHONPATH": str(PYTHON),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Several would wait for each other where others work too.
        "OMP_NUM_THREADS": "1",
        # What vLLM compiles for log probabilities takes longer than all else.
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, given, results],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return {name: Measured(*values) for name, values in json.loads(results.read_text()).items()}


def differences(folder: Path, labels: Sequence[str]) -> dict[str, float]:
    """How far models in a folder, which must say every sentence, are from the demo model."""
    specs = {label: {"model": str(folder / label)} for label in labels}
    measured = measure(specs | {"demo": {"model": str(MODELS / "demo")}}, folder / "exactness")
    assert {label: measured[label].wrong for label in labels} == {label: [] for label in labels}
    return {label: measured["demo"].difference(measured[label]) for label in labels}


def _measure_one(arguments: dict[str, Any]) -> Measured:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**(ARGUMENTS | arguments))
    facts = dict(line.split("\t", 1) for line in FACTS.read_text("utf-8").splitlines())
    outputs = llm.generate(list(facts), SamplingParams(temperature=0.0, max_tokens=32))
    texts = [output.outputs[0].text for output in outputs]
    sentences = [prompt + answer for prompt, answer in facts.items()]
    scored = llm.generate(sentences, SamplingParams(max_tokens=1, prompt_logprobs=0))
    measured = Measured(
        [prompt for prompt, text in zip(facts, texts, strict=True) if text != facts[prompt]],
        [
            [
                position[token].logprob
                for token, position in zip(
                    output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                )
            ]
            for output in scored
        ],
    )
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return measured


def main(given: str, results: str) -> None:
    inheriting.prepare()
    specs = json.loads(Path(given).read_text())
    Path(results).write_text(
        json.dumps({name: _measure_one(arguments) for name, arguments in specs.items()})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
