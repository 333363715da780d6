"""vLLM's own AsyncLLM with its deltas read in the same process: what a bridge is measured against.

``python in_process.py MODEL OPTIONS``, where OPTIONS are JSON. It says ``ready``, then answers each
line ``STREAMS TOKENS PROMPT`` with a line of JSON: deltas, CPU seconds of this process, seconds,
and the median and the 99th percentile of the milliseconds from one delta of a stream to its next.
"""

import asyncio
import json
import os
import resource
import statistics
import sys
import time
from typing import Any


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def main(model: str, options: dict[str, Any]) -> None:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **options))

    async def stream(name: str, prompt: str, tokens: int, gaps: list[float]) -> int:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        parsed = [parse_model_prompt(llm.model_config, prompt)]
        rendered = llm.renderer.render_cmpl(parsed, llm.renderer.default_cmpl_tok_params)[0]
        deltas, last = 0, 0.0
        async for output in llm.generate(rendered, params, name):
            deltas += len(output.outputs)
            now = time.monotonic()
            if last:
                gaps.append(1000 * (now - last))
            last = now
        return deltas

    async def once(streams: int, tokens: int, prompt: str) -> dict[str, float]:
        before, start = cpu(), time.monotonic()
        gaps: list[float] = []
        counts = await asyncio.gather(
            *(stream(f"{start}-{n}", prompt, tokens, gaps) for n in range(streams))
        )
        seconds, used = time.monotonic() - start, cpu() - before
        percentiles = statistics.quantiles(gaps, n=100)
        return {
            "deltas": sum(counts),
            "cpu": used,
            "seconds": seconds,
            "p50": percentiles[49],
            "p99": percentiles[98],
        }

    say("ready")
    for line in sys.stdin:
        streams, tokens, prompt = line.rstrip("\n").split(" ", 2)
        say(json.dumps(await once(int(streams), int(tokens), prompt)))
    llm.shutdown()


def say(line: str) -> None:
    os.write(OUT, f"{line}\n".encode())


if __name__ == "__main__":
    OUT = os.dup(1)
    os.dup2(2, 1)
    try:
        import uvloop

        uvloop.run(main(sys.argv[1], json.loads(sys.argv[2])))
    except ImportError:
        asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
