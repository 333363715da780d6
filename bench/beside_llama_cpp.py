"""How fast models on a CPU are beside llama.cpp: half a billion parameters with random weights, as
a GGUF file that both have loaded, or in a format of safetensors beside the file nearest to it.

    OMP_NUM_THREADS=1 PYTHON bench/beside_llama_cpp.py LLAMA_PYTHON [MODEL...]

with the Python of the library's environment (`mix vllm.doctor` names it), and one that has
llama-cpp-python (`scripts/quantized_models/build` makes it). MODEL is one of ``MODELS``. Both sides
have theirs loaded at once and are asked by turns, with OMP_NUM_THREADS threads each; only what
BENCH_ASKED names, where it is set, in BENCH_ROUNDS rounds. The models, some hundred megabytes each,
are kept in the folder BENCH_MODELS where that is set.

Ratios are medians of those of each round, with their 95 % interval by bootstrap: of tokens per
second; per CPU second of all processes; and per CPU second of the process that computes, which is
what the first one is where nothing else runs on the machine. Each side runs under the library's
guard, which leaves no process behind, however this one ends.
"""

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GUARD = ROOT / "python" / "vllm_bridge" / "guard.py"
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "15"))


class Pair(NamedTuple):
    """What is compared, as ``half_billion`` calls it.

    Args:
        options: of our engine
        environment: of its process
    """

    ours: str
    theirs: str
    options: dict[str, Any] | None = None
    environment: dict[str, str] | None = None


# As llama.cpp has them.
ROUNDED = {"quantization_config": {"activations": "int8"}}

# Integers of 4 bits in groups of 128 are beside Q4_0, which has them in groups of 32: it is
# llama.cpp's fastest, and the nearest in bits (4.5 for a weight, AWQ 4.2, Q4_K_M 4.9).
MODELS = {
    "bf16": Pair("bf16", "BF16"),
    "AWQ": Pair("AWQ", "Q4_0"),
    "AWQ, vLLM's kernel": Pair(
        "AWQ", "Q4_0", environment={"VLLM_DISABLED_KERNELS": "PackedLinearKernel"}
    ),
    "AWQ, activations in 8 bits": Pair("AWQ", "Q4_0", ROUNDED),
    "W4A16": Pair("W4A16", "Q4_0"),
    "W4A16, activations in 8 bits": Pair("W4A16", "Q4_0", ROUNDED),
    "W8A8": Pair("W8A8", "Q8_0"),
    'dtype: "int8"': Pair("bf16", "Q8_0", {"dtype": "int8"}),
    "Q8_0": Pair("Q8_0", "Q8_0"),
    "Q4_K_M": Pair("Q4_K_M", "Q4_K_M"),
    "Q4_0": Pair("Q4_0", "Q4_0"),
}

# What is asked: of how many sequences, with prompts and answers of how many tokens. What counts is
# the longer one.
ASKED = {"one sequence": (1, 8, 24), "16 sequences": (16, 4, 24), "prompt of 512": (1, 512, 1)}


class Ours:
    """The engine of this library."""

    @classmethod
    async def load(cls, file: str, options: dict[str, Any]) -> "Ours":
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
                **options,
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
    async def load(cls, file: str, options: dict[str, Any]) -> "LlamaCpp":
        import llama_cpp

        made = cls()
        made._api = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 4096, 1024, 512, 16
        threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
        params.n_threads = params.n_threads_batch = threads
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


async def serve(kind: str, file: str, options: str) -> None:
    """Loads a model and answers each line, which says what is asked, with the number of tokens and
    the seconds that they took, on the descriptors that a guard gives."""
    questions, answers = os.fdopen(3), os.fdopen(4, "w")
    engine: Any = await {"ours": Ours, "llama.cpp": LlamaCpp}[kind].load(file, json.loads(options))
    while line := await asyncio.to_thread(questions.readline):
        sequences, length, answer = ASKED[line.strip()]
        prompts = [
            [100 + (7 * index + 13 * place) % 800 for place in range(length)]
            for index in range(sequences)
        ]
        began = time.perf_counter()
        await engine.run(prompts, answer)
        seconds = time.perf_counter() - began
        tokens = sequences * max(length, answer)
        print(json.dumps([tokens, seconds]), file=answers, flush=True)


class Rates(NamedTuple):
    """Tokens per second, per CPU second of all processes, and of the one that computes."""

    second: float
    cpu: float
    computing: float


class Side:
    """A process that serves, and what it starts, under a guard of its own."""

    def __init__(self, kind: str, python: str, model: Path, pair: Pair, folder: Path) -> None:
        self._run = folder / kind
        guard = [sys.executable, "-I", "-S", str(GUARD), str(self._run), "--"]
        # Who is under a guard is asked on 3, and answers on 4.
        descriptors = ["sh", "-c", 'exec "$@" 3<&0 4>&1 0</dev/null 1>&2', "sh"]
        environment = dict(os.environ)
        if kind == "ours":
            environment |= {"PYTHONPATH": str(ROOT / "python"), **(pair.environment or {})}
        served = [__file__, "--serve", kind, str(model), json.dumps(pair.options or {})]
        self._process = subprocess.Popen(
            [*descriptors, *guard, python, *served],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str) -> Rates:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        before = self._cpu_seconds()
        stdin.write(what + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise SystemExit(f"it ended: {(self._run / 'log').read_text()[-4000:]}")
        tokens, seconds = json.loads(answer)
        spent = [now - before.get(pid, 0) for pid, now in self._cpu_seconds().items()]
        return Rates(tokens / seconds, tokens / sum(spent), tokens / max(spent))

    def _cpu_seconds(self) -> dict[int, float]:
        """Of each process that the guard watches over."""
        import psutil

        spent = {}
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                spent[process.pid] = sum(process.cpu_times()[:2])
        return spent

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def interval(numbers: Sequence[float]) -> tuple[float, float, float]:
    """The median and the interval that holds it at 95 %, by bootstrap."""
    import numpy

    drawn = numpy.random.default_rng(0).choice(numbers, (2000, len(numbers)))
    low, high = numpy.percentile(numpy.median(drawn, axis=1), [2.5, 97.5])
    return statistics.median(numbers), low, high


def compare(llama_python: str, name: str, models: Path, folder: Path) -> None:
    # Which the Python of llama.cpp has no need of.
    import half_billion

    pair = MODELS[name]
    sides: list[Side] = []
    try:
        for kind, python, format in (
            ("ours", sys.executable, pair.ours),
            ("llama.cpp", llama_python, pair.theirs),
        ):
            model = half_billion.make(format, models)
            sides.append(Side(kind, python, model, pair, folder))
        for what in [os.environ["BENCH_ASKED"]] if "BENCH_ASKED" in os.environ else ASKED:
            for side in sides:
                side.ask(what)
            rounds = [[side.ask(what) for side in sides] for _ in range(ROUNDS)]
            speeds = [
                statistics.median(rates.second for rates in of) for of in zip(*rounds, strict=True)
            ]
            ratios = zip(
                *([one / other for one, other in zip(*both, strict=True)] for both in rounds),
                strict=True,
            )
            figures = [f"{speed:.1f}" for speed in speeds] + [
                "{:.2f} ({:.2f} to {:.2f})".format(*interval(of)) for of in ratios
            ]
            print(f"| {name} | {pair.theirs} | {what} | {' | '.join(figures)} |", flush=True)
    finally:
        for side in sides:
            side.end()


def main() -> None:
    if sys.argv[1] == "--serve":
        asyncio.run(serve(*sys.argv[2:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(
            "| model | llama.cpp's | asked | tokens/s | llama.cpp | ratio | of all CPU time | "
            "computing |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
        )
        for name in sys.argv[2:] or MODELS:
            models = Path(os.environ.get("BENCH_MODELS", folder))
            with tempfile.TemporaryDirectory(dir=folder) as runs:
                compare(sys.argv[1], name, models, Path(runs))


if __name__ == "__main__":
    main()
