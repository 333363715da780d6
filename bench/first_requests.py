"""How long the first request of each kind takes on an engine that is ready, and the second.

    PYTHON bench/first_requests.py [KIND...]

with the Python of the library's environment (`mix vllm.doctor` names it). What PyTorch compiled
before on this machine is not used, so that the figures are those of a new one.
"""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "priv" / "models" / "demo"
GREEDY = {"temperature": 0.0, "max_tokens": 8}
OPTIONS = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**28,
    "max_model_len": 1024,
    "enable_lora": True,
    "max_lora_rank": 8,
}

# What each kind of request adds to a greedy one.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"temperature": 1.0},
    "seed": {"temperature": 1.0, "seed": 7},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "n": {"temperature": 1.0, "n": 3},
    "penalties": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "logit_bias": {"logit_bias": {"7": 2.0}},
    "allowed_token_ids": {"allowed_token_ids": [5, 6, 7]},
    "bad_words": {"bad_words": ["Paris"]},
    "min_tokens": {"min_tokens": 4},
    "stop": {"stop": ["."]},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "structured outputs: json": {
        "structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    },
    "structured outputs: choice": {"structured_outputs": {"choice": ["Paris", "Tokyo"]}},
    "structured outputs: regex": {"structured_outputs": {"regex": "[a-z]+"}},
}


async def measure(kinds: list[str]) -> None:
    from vllm_bridge.beam_search import SearchParams
    from vllm_bridge.chat import ChatParams
    from vllm_bridge.engine.engine import GenerateParams
    from vllm_bridge.engine.start import load
    from vllm_bridge.lora import LoRA

    started = time.perf_counter()
    engine = await load(str(MODEL), OPTIONS)
    print("| kind of request | first | second |\n| --- | --- | --- |", flush=True)
    seconds = time.perf_counter() - started

    def generate(**more: Any) -> Callable[[str], Awaitable[Any]]:
        params = GREEDY | {k: v for k, v in more.items() if k != "lora_request"}
        lora = more.get("lora_request")
        return lambda id: engine.generate(
            id, GenerateParams("The capital of France is", params, lora_request=lora)
        )

    asked: dict[str, Callable[[str], Awaitable[Any]]] = {
        kind: generate(**more) for kind, more in KINDS.items()
    }
    messages = [{"role": "user", "content": "Hello!"}]
    lora = LoRA("demo", 1, str(ROOT / "priv" / "models" / "demo-lora"))
    asked |= {
        "chat": lambda id: engine.chat(id, ChatParams(messages=messages, sampling_params=GREEDY)),
        "LoRA": generate(lora_request=lora),
        "beam search": lambda id: engine.beam_search(
            id, SearchParams("The", {"beam_width": 2, "max_tokens": 4})
        ),
    }
    for kind in kinds or asked:
        times = []
        for turn in range(2):
            began = time.perf_counter()
            await asked[kind](f"{kind}-{turn}")
            times.append(time.perf_counter() - began)
        print(f"| {kind} | {times[0] * 1000:.0f} ms | {times[1] * 1000:.0f} ms |", flush=True)
    print(f"\nLoaded in {seconds:.1f} s.")
    engine._llm.shutdown()


def main() -> None:
    sys.path.insert(0, str(ROOT / "python"))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        # EngineCore finds the library's plugin by it.
        os.environ["PYTHONPATH"] = str(ROOT / "python")
        asyncio.run(measure(sys.argv[1:]))


if __name__ == "__main__":
    main()
