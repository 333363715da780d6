"""What a model is like, measured: what ``compare`` sets beside the same of others.

One engine of the model is started, as any engine of this library is, and asked three things:

- what it expects at each place of a text that it has not seen; see ``distributions``
- how it goes on from a few beginnings of the text, greedily
- how long it takes for that: tokens/s of one request, which is the median of the few

The text ships with the package (``held_out.txt``, other than what models are calibrated with) or is
given. It is cut into windows of ``WINDOW`` tokens at most, as llama.cpp does, each of which begins
anew. Windows are asked about one after another: some formats round by what is computed together.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from vllm_bridge.errors import BridgeError
from vllm_bridge.rpc.call import Call

if TYPE_CHECKING:
    from vllm_bridge.engine.engine import Engine
    from vllm_bridge.engine.plan import Plan
    from vllm_bridge.jobs.distributions import Distributions

WINDOW: Final = 512

# Of so many tokens the probabilities are measured at most: the standard error of a mean KL
# divergence is then about five hundredths of it.
TOKENS: Final = 2048

# How many beginnings are gone on from, of how many tokens each, and by how many.
BEGINNINGS: Final = 3
BEGINNING: Final = 32
ANSWER: Final = 32

# Bytes that all processes of an engine took together on a processor, whose model had 9 MB.
_FRAMEWORK: Final = 1100 * 2**20

# The line between two passages of the text that ships.
_BETWEEN: Final = "\n=====\n"

Tell = Callable[[str, int | None, int | None], None]


class MeasureParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``measure``; see guides/protocol.md."""

    model: str
    out: str
    options: dict[str, Any] = {}
    texts: list[str] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = TOKENS


async def measure(call: Call, params: MeasureParams) -> dict[str, Any]:
    """Measures a model and writes what ``compare`` reads."""
    from vllm_bridge.engine import start

    def tell(phase: str, done: int | None = None, total: int | None = None) -> None:
        call.notify("progress", {"id": call.id, "phase": phase, "done": done, "total": total})

    texts = held_out() if params.texts is None else params.texts
    options = prepared(params.model, params.options)
    engine = await start.load(
        params.model, options, lambda phase, _figures=None: tell(f"load: {phase}", None, None)
    )
    measured = await of(engine, params.model, options, texts, params.max_tokens, tell)
    measured.save(params.out)
    return measured.figures


def memory(weights: int) -> int:
    """Bytes of this machine's memory that measuring a model takes at least; on an accelerator the
    weights are in its own.

    Args:
        weights: bytes of them, in files
    """
    from vllm_bridge import versions

    return _FRAMEWORK + (weights if versions.is_cpu_build() else 0)


def held_out() -> list[str]:
    """The passages of the text that ships."""
    path = os.path.join(os.path.dirname(__file__), "held_out.txt")
    with open(path, encoding="utf-8") as file:
        return file.read().strip("\n").split(_BETWEEN)


def prepared(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Engine options under which a model is measured: as they were given, and where nothing is
    said without what takes time and memory that measuring has no use for.

    Sets variables of the environment that are for the life of a worker.
    """
    from vllm_bridge import versions
    from vllm_bridge.engine.plan import plan
    from vllm_bridge.sizing import kv_cache

    options = {"enforce_eager": True, **options, "max_logprobs": -1, "disable_log_stats": False}
    if options["enforce_eager"] is True:
        # What vLLM compiles for log-probabilities takes longer than all else.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    config = plan(model, options).checkpoint.config
    if not config:  # it will not start
        return options
    longest = min(kv_cache.max_length(config, options), WINDOW + ANSWER)
    options = {"max_model_len": longest, **options}
    kind = "cpu" if versions.is_cpu_build() else "cuda"
    cache = kv_cache.of(config, options, kind)
    if not cache.is_approximate:
        options = {"kv_cache_memory_bytes": max(cache.bytes(longest, 2), 2**26), **options}
    return options


async def of(
    engine: "Engine",
    model: str,
    options: dict[str, Any],
    texts: Sequence[str],
    max_tokens: int,
    tell: Tell,
) -> "Distributions":
    """What a loaded engine expects of the texts, with all other figures.

    Raises:
        BridgeError: ``unsupported`` for what does not go on from texts; ``invalid_option`` for
            texts of which nothing can be measured
    """
    from vllm_bridge.jobs import distributions

    info = engine.info()
    if info["runner"] != "generate":
        raise BridgeError(
            "unsupported",
            f"`{model}` makes vectors and does not go on from a text: there is nothing to measure.",
            {"runner": info["runner"]},
        )
    size = min(WINDOW, info["max_model_len"] - 1)
    asked = _Asked(texts, size, max_tokens, tell)
    measured: Distributions = await engine.asked(_scored, asked)
    answers: _Answers = await engine.asked(_answered, asked)
    figures = {
        "model": model,
        **_facts(engine.plan, info),
        "tokens": len(measured.chosen),
        "perplexity": finite(distributions.perplexity(measured)),
        "bits_per_byte": finite(distributions.bits_per_byte(measured, asked.bytes)),
        "tokens_per_second": answers.tokens_per_second,
        "answers": answers.texts,
        "answer_ids": answers.ids,
    }
    return dataclasses.replace(measured, figures=figures)


def finite(number: float) -> float | None:
    """A number as it travels: what is none, or has no end, is nil."""
    return number if math.isfinite(number) else None


def _facts(plan: "Plan", info: dict[str, Any]) -> dict[str, Any]:
    """What is known of a model without asking it."""
    from vllm_bridge.checkpoints import detect
    from vllm_bridge.sizing import weights

    found = detect.of(plan.checkpoint)
    loaded = weights.on_device(plan.checkpoint, plan.options, info["device"])
    return {
        "format": detect.format_name(found),
        "method": info["quantization"],
        "bits": found.bits,
        "group_size": found.scheme.group_size,
        "activation_bits": found.scheme.activation_bits,
        "bits_per_weight": found.bits_per_weight,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "memory": loaded.memory or None,
        "note": info["quantization_note"],
    }


class _Asked:
    """What an engine is asked.

    Args:
        size: of a window, in tokens
    """

    def __init__(self, texts: Sequence[str], size: int, max_tokens: int, tell: Tell) -> None:
        self.texts, self.size, self.max_tokens, self.tell = texts, size, max_tokens, tell
        self.windows: list[list[int]] = []
        self.bytes = 0.0

    def cut(self, tokenizer: Any) -> None:
        """Makes windows of the texts, each with what the tokenizer begins a text with, until they
        have so many tokens that follow another."""
        first = _beginning(tokenizer)
        left = self.max_tokens
        for text in self.texts:
            ids = list(tokenizer.encode(text, add_special_tokens=False))
            step = self.size - len(first)
            windows = [first + ids[at : at + step] for at in range(0, len(ids), step)]
            for window in windows:
                kept = window[: left + 1]
                if len(kept) > 1:
                    self.windows.append(kept)
                    left -= len(kept) - 1
                    # Tokens are taken to be of the same length all over a text.
                    self.bytes += len(text.encode()) / len(ids) * (len(kept) - 1)
        if not self.windows:
            raise BridgeError(
                "invalid_option",
                "The texts have no two tokens that follow each other.",
                {"option": "texts"},
                remedy="Give some sentences, or leave `texts` out.",
            )


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer sets before a text, if it does."""
    first = getattr(tokenizer, "bos_token_id", None)
    begun = list(tokenizer.encode("a", add_special_tokens=True))
    return [first] if first is not None and begun[:1] == [first] else []


async def _scored(llm: Any, asked: _Asked) -> "Distributions":
    """What the engine expects at each place of the windows."""
    import numpy as np

    from vllm_bridge.jobs.distributions import FULL, KEPT, Distributions

    if llm.model_config.is_encoder_decoder:
        raise BridgeError(
            "unsupported",
            "A model with an encoder goes on from its input and not from a text: "
            "it is not measured.",
        )
    asked.cut(llm.get_tokenizer())
    vocabulary = llm.model_config.get_vocab_size()
    kept = -1 if vocabulary <= FULL else KEPT
    parts = []
    for number, window in enumerate(asked.windows):
        asked.tell("measuring", number, len(asked.windows))
        output = await _completed(llm, window, f"window-{number}", prompt_logprobs=kept)
        parts.append(_columns(output.prompt_logprobs, len(window) - 1))
    chosen, ids, logprobs = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Distributions(
        tokens=np.array([token for window in asked.windows for token in window], np.uint32),
        lengths=np.array([len(window) for window in asked.windows], np.uint32),
        chosen=chosen,
        ids=ids,
        logprobs=logprobs,
        vocabulary=vocabulary,
        figures={},
    )


def _columns(flat: Any, places: int) -> tuple[Any, Any, Any]:
    """Of each place but the first: the log-probability of its token, and the likeliest tokens
    with theirs."""
    import numpy as np

    logprobs = np.array(flat.logprobs, np.float32).reshape(places, -1)
    ids = np.array(flat.token_ids, np.uint32).reshape(places, -1)
    # vLLM tells the token itself first, and again among the likeliest.
    return logprobs[:, 0], np.ascontiguousarray(ids[:, 1:]), np.ascontiguousarray(logprobs[:, 1:])


@dataclasses.dataclass(frozen=True)
class _Answers:
    """How the model goes on from the beginnings."""

    texts: list[str]
    ids: list[list[int]]
    tokens_per_second: float | None


async def _answered(llm: Any, asked: _Asked) -> _Answers:
    tokenizer = llm.get_tokenizer()
    ids, rates = [], []
    for number, window in enumerate(asked.windows[:BEGINNINGS]):
        asked.tell("generating", number, min(BEGINNINGS, len(asked.windows)))
        beginning = window[: min(BEGINNING, (len(window) + 1) // 2)]
        started = time.monotonic()
        output = await _completed(
            llm, beginning, f"answer-{number}", max_tokens=ANSWER, ignore_eos=True
        )
        (completion,) = output.outputs
        ids.append(list(completion.token_ids))
        rates.append(_rate(output.metrics, len(ids[-1]), time.monotonic() - started))
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]
    return _Answers(texts, ids, statistics.median(rates))


def _rate(metrics: Any, tokens: int, seconds: float) -> float:
    """Tokens/s of an answer: those that follow the first, which is of the prompt's step."""
    if metrics is not None and tokens > 1:
        seconds = metrics.last_token_ts - metrics.first_token_ts
        tokens -= 1
    return tokens / max(seconds, 1e-9)


async def _completed(llm: Any, tokens: list[int], name: str, **params: Any) -> Any:
    """The output of one request, which is alone."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from vllm_bridge import diagnosis, finish

    asked = {"max_tokens": 1, "temperature": 0.0, "flat_logprobs": True, **params}
    sampling = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False, **asked)
    prompt = llm.renderer.render_cmpl([{"prompt_token_ids": tokens}])[0]
    last = None
    async for last in llm.generate(prompt, sampling, name):
        if (meaning := finish.early(last)) is not None:
            raise await diagnosis.early_end(meaning, name, last, structured=False, asleep=False)
    return last


METHODS: dict[str, Any] = {"measure": (MeasureParams, measure)}
