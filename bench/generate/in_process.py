"""vLLM without a bridge, as a Python program uses it: what ``bench/generate.exs`` measures against.

``python in_process.py AsyncLLM|LLM MODEL OPTIONS``, where OPTIONS are JSON. It says ``ready``, then
does what each line says and answers it with its seconds, the tokens that it had, and the median
milliseconds until the first output and from one to the next:

* ``final CALLERS REQUESTS TOKENS PROMPT`` (AsyncLLM): so many callers at once that ask so many
  requests each, one after another, and read their last output
* ``stream CALLERS REQUESTS TOKENS PROMPT`` (AsyncLLM): the same with deltas
* ``list PROMPTS 1 TOKENS PROMPT`` (LLM): one call of ``LLM.generate``
"""

import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from typing import Any


def sampling(tokens: int, kind: str) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA if kind == "stream" else RequestOutputKind.FINAL_ONLY,
    )


async def serve_async(model: str, options: dict[str, Any]) -> None:
    from vllm import AsyncEngineArgs
    from vllm.renderers.inputs.preprocess import parse_model_prompt
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **options))
    numbers = itertools.count()

    async def caller(
        kind: str, requests: int, tokens: int, prompt: str, first: list[float], gaps: list[float]
    ) -> int:
        count = 0
        for _ in range(requests):
            last = begin = time.perf_counter()
            parsed = [parse_model_prompt(llm.model_config, prompt)]
            rendered = llm.renderer.render_cmpl(parsed, llm.renderer.default_cmpl_tok_params)[0]
            params = sampling(tokens, kind)
            async for output in llm.generate(rendered, params, str(next(numbers))):
                count += sum(len(one.token_ids) for one in output.outputs)
                now = time.perf_counter()
                (first if last == begin else gaps).append(now - last)
                last = now
        return count

    say("ready")
    for line in sys.stdin:
        kind, callers, requests, tokens, prompt = line.rstrip("\n").split(" ", 4)
        first: list[float] = []
        gaps: list[float] = []
        start = time.monotonic()
        given = (kind, int(requests), int(tokens), prompt, first, gaps)
        counts = await asyncio.gather(*(caller(*given) for _ in range(int(callers))))
        seconds = time.monotonic() - start
        say(f"{seconds} {sum(counts)} {median_ms(first)} {median_ms(gaps)}")
    llm.shutdown()


def serve_list(model: str, options: dict[str, Any]) -> None:
    from vllm import LLM

    llm = LLM(model, **options)
    say("ready")
    for line in sys.stdin:
        _, count, _, tokens, prompt = line.rstrip("\n").split(" ", 4)
        start = time.monotonic()
        prompts = [f"{prompt} {number}" for number in range(int(count))]
        outputs = llm.generate(prompts, sampling(int(tokens), "list"), use_tqdm=False)
        seconds = time.monotonic() - start
        say(f"{seconds} {sum(len(output.outputs[0].token_ids) for output in outputs)} 0.0 0.0")


def median_ms(times: list[float]) -> float:
    return 1000 * statistics.median(times) if times else 0.0


def say(line: str) -> None:
    os.write(OUT, f"{line}\n".encode())


if __name__ == "__main__":
    OUT = os.dup(1)
    os.dup2(2, 1)
    model, options = sys.argv[2], json.loads(sys.argv[3])
    if sys.argv[1] == "LLM":
        serve_list(model, options)
    else:
        import uvloop

        uvloop.run(serve_async(model, options))
