"""How fast GGUF files are, beside llama.cpp on the same files, on a model of half a billion
parameters with random weights.

    PYTHON bench/gguf_speed.py LLAMA_PYTHON [TYPE...]

with the Python of the library's environment (`mix vllm.doctor` names it), and one that has
llama-cpp-python (`scripts/quantized_models/build` makes it). Both have the file loaded at once and
are asked by turns. The files, some hundred megabytes each, are kept in the folder BENCH_GGUF where
that is set.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TYPES = ("Q4_K_M", "Q8_0", "Q4_0")
ROUNDS = 5
PROMPT, ANSWER, LONG = 8, 64, 512
# What is asked: how many sequences are decoded, and None for a long prompt.
ASKED: dict[str, int | None] = {"one sequence": 1, "16 sequences": 16, f"prompt of {LONG}": None}
SIZES = {
    "hidden_size": 1280,
    "intermediate_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def make(type: str, folder: Path) -> Path:
    """Writes the model."""
    sys.path[:0] = [str(ROOT / "python" / "tests"), str(ROOT / "python")]
    import torch

    import gguf_models

    made = folder / f"random-{type}.gguf"
    if made.exists():
        return made
    config = {**gguf_models.demo().config, **SIZES}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (
        config["head_dim"] * config[name] for name in ("num_attention_heads", "num_key_value_heads")
    )
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    all_shapes = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    } | {
        "model.norm.weight": (hidden,),
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    torch.manual_seed(1)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, dtype=torch.float16) / 50
        for name, shape in all_shapes.items()
    }
    return gguf_models.write(gguf_models.Model("random", tensors, config), type, folder)


class Ours:
    """The engine of this library."""

    @classmethod
    async def load(cls, file: str) -> "Ours":
        sys.path.insert(0, str(ROOT / "python"))
        from vllm_bridge.engine.start import load

        made = cls()
        made._engine = await load(
            file,
            {
                "max_model_len": 1024,
                "kv_cache_memory_bytes": 2**28,
                "enable_prefix_caching": False,
                "enforce_eager": bool(os.environ.get("BENCH_EAGER")),
            },
        )
        made._requests = 0
        return made

    async def run(self, prompts: list[list[int]], answer: int) -> None:
        from vllm_bridge.engine.engine import GenerateParams

        params = {"temperature": 0.0, "max_tokens": answer, "ignore_eos": True}
        self._requests += 1
        await asyncio.gather(
            *(
                self._engine.generate(
                    f"{self._requests}-{index}",
                    GenerateParams(
                        {"prompt_token_ids": array("I", prompt).tobytes()}, dict(params)
                    ),
                )
                for index, prompt in enumerate(prompts)
            )
        )


class LlamaCpp:
    """llama.cpp, by its own interface."""

    @classmethod
    async def load(cls, file: str) -> "LlamaCpp":
        import llama_cpp

        made = cls()
        made._api = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 4096, 1024, 512, 16
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.kv_unified = True
        made._context = llama_cpp.llama_init_from_model(model, params)
        made._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        made._batch = llama_cpp.llama_batch_init(1024, 0, 1)
        return made

    async def run(self, prompts: list[list[int]], answer: int) -> None:
        import numpy

        api, batch = self._api, self._batch
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        tokens, places = prompts, [0] * len(prompts)
        for _ in range(answer):
            count, ends = 0, []
            for sequence, given in enumerate(tokens):
                for token in given:
                    batch.token[count], batch.pos[count] = token, places[sequence]
                    batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                    batch.logits[count] = False
                    places[sequence] += 1
                    count += 1
                batch.logits[count - 1] = True
                ends.append(count - 1)
            batch.n_tokens = count
            if api.llama_decode(self._context, batch):
                raise RuntimeError("llama.cpp could not decode")
            tokens = []
            for end in ends:
                logits = api.llama_get_logits_ith(self._context, end)
                numbers = numpy.ctypeslib.as_array(logits, (self._vocabulary,))
                tokens.append([int(numbers.argmax())])


async def serve(kind: str, file: str) -> None:
    """Loads a file and answers each line, which says what is asked, with tokens per second."""
    # What is logged must not go where the answers go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Any = await {"ours": Ours, "llama.cpp": LlamaCpp}[kind].load(file)
    while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        sequences = ASKED[line.strip()]
        long = sequences is None
        prompts = [
            [100 + (7 * index + 13 * place) % 800 for place in range(LONG if long else PROMPT)]
            for index in range(sequences or 1)
        ]
        began = time.perf_counter()
        await engine.run(prompts, 1 if long else ANSWER)
        seconds = time.perf_counter() - began
        tokens = LONG if long else ANSWER * len(prompts)
        print(json.dumps(tokens / seconds), file=answers, flush=True)


def ask(process: "subprocess.Popen[str]", what: str) -> float:
    if not (process.stdin and process.stdout):
        raise TypeError
    process.stdin.write(what + "\n")
    process.stdin.flush()
    return float(json.loads(process.stdout.readline()))


def compare(llama_python: str, type: str, file: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    pythons = {"ours": sys.executable, "llama.cpp": llama_python}
    processes = {
        kind: subprocess.Popen(
            [python, __file__, "--serve", kind, str(file)],
            env=environment if kind == "ours" else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind, python in pythons.items()
    }
    try:
        for what in ASKED:
            for process in processes.values():
                ask(process, what)
            speeds: dict[str, list[float]] = {kind: [] for kind in processes}
            for _ in range(ROUNDS):
                for kind, process in processes.items():
                    speeds[kind].append(ask(process, what))
            ours, theirs = (statistics.median(speeds[kind]) for kind in processes)
            ratio = statistics.median(
                one / other for one, other in zip(*speeds.values(), strict=True)
            )
            print(f"| {type} | {what} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |", flush=True)
    finally:
        for process in processes.values():
            process.stdin.close()  # type: ignore[union-attr]
            process.terminate()
            process.wait()


def main() -> None:
    if sys.argv[1] == "--serve":
        asyncio.run(serve(*sys.argv[2:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        print("| file | asked | tokens/s | llama.cpp | ratio |\n| --- | --- | --- | --- | --- |")
        for type in sys.argv[2:] or TYPES:
            file = make(type, Path(os.environ.get("BENCH_GGUF", folder)))
            compare(sys.argv[1], type, file)


if __name__ == "__main__":
    main()
