"""What other people's exceptions mean: vLLM's, pydantic's, the operating system's.

vLLM raises plain ``ValueError`` and ``RuntimeError`` for most of what can go wrong at a start,
often in a child process whose traceback only the log has. So texts are looked at, in one table,
and what no rule knows is passed on as ``load_failed`` with vLLM's own words.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import re
import signal
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from vllm_bridge import finish
from vllm_bridge.errors import BridgeError, internal_error, map_exceptions, traceback_of
from vllm_bridge.patches import ranks

logger = logging.getLogger(__name__)

# Set by the guard: the folder whose files ``log`` and ``log.1`` have all that the processes of the
# worker wrote.
RUN_FOLDER = "EX_VLLM_RUN"

# How many of its last lines go into an error, and how many are searched for a full disk, which
# compilers report in the middle of long messages.
LOG_LINES = 40
_RECENT_LINES = 500

# How long a child's traceback may take from its stderr to the log.
_LOG_PATIENCE_SECONDS = 1.0
_LOG_PAUSE_SECONDS = 0.05

_MAX_TEXT = 400

# "(EngineCore pid=42) ERROR 11-20 19:30:52 [core.py:1510] " in front of what vLLM logs.
_LOG_PREFIX = re.compile(r"^\((?P<process>[^)]*)\) (?:[A-Z]+ \S+ \S+ \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(
    r"^(?P<type>(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt))(?:: (?P<text>.*))?$"
)

# What a parent says when a child of it failed, and one child when another did: not the cause, only
# its messenger.
_MESSENGERS = re.compile(
    r"initialization failed|See (?:root cause|stack trace)|EngineDeadError|BrokenPipeError"
    r"|Connection (?:closed|reset) by peer"
)

# "Failed core proc(s): {'EngineCore': -9}": which processes ended how. Where vLLM looked before the
# system could say it, there is none.
_ENDED = re.compile(r"'(\w+)': (-?\d+)")


_AGAIN = "Download them again, from one place."

# In a traceback: where a model takes its weights.
_LOADS_WEIGHTS = re.compile(r", in (?:load_weights|weight_loader(?:_v2)?)$")


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    reason: str
    opening: str
    remedy: str


def _rule(pattern: str, reason: str, opening: str, remedy: str = "") -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE), reason, opening, remedy)


# The first that matches the exception's type and text tells the reason.
_RULES = (
    _rule(
        r"weights were not initialized",
        "invalid_checkpoint",
        "The model's files are incomplete or contradict its config.",
        "Download them again, from one place. A model that is known to run without them is loaded "
        "unchecked by `model_loader_extra_config: %{enable_weights_track: false}`.",
    ),
    _rule(
        r"The checkpoint's `",
        "invalid_checkpoint",
        "The model's files are damaged or contradict its config.",
        _AGAIN,
    ),
    _rule(
        r"weights are not finite numbers",
        "invalid_checkpoint",
        "The model would answer nonsense: its files are damaged, or its weights are too large for "
        "the `dtype`.",
        'Give `dtype: "bfloat16"`, which has room for them, or download the model again.',
    ),
    _rule(
        r"KV cache|cache blocks",
        "out_of_memory",
        "The KV cache does not fit.",
        "Lower `max_model_len` or `max_num_seqs`, or give it more "
        "memory (`kv_cache_memory_bytes`, `gpu_memory_utilization`).",
    ),
    _rule(
        r"out of memory|OutOfMemory|MemoryError|bad_alloc|can't allocate memory"
        r"|memory utilization|Insufficient space in /dev/shm",
        "out_of_memory",
        "There is not enough memory to start the engine.",
        "Use a smaller or a quantized model, or lower `gpu_memory_utilization`, `max_model_len` or "
        "`max_num_seqs`.",
    ),
    _rule(
        r"busy or unavailable",
        "out_of_memory",
        "Another process has the device for itself.",
        "End that one, or start the engine on another device (`devices`).",
    ),
    _rule(
        r"InvalidCxxCompiler|CppCompileError",
        "load_failed",
        "The model could not be compiled.",
        "Install a C++ compiler (g++), or set `enforce_eager: true`.",
    ),
    _rule(
        r"quantiz|_quant\b|Cannot find the config file for|weight_bits|desc_act|marlin",
        "unsupported_quantization",
        "This quantization does not run here, or is not the checkpoint's.",
    ),
    _rule(
        r"failed to be inspected",
        "unsupported_model",
        "vLLM has this architecture, and its code cannot be imported here.",
        "A package that it needs is probably missing: the log says which.",
    ),
    _rule(
        r"are not supported for now|does not recognize this architecture|model type `"
        r"|No model architectures|architectures? .* not supported",
        "unsupported_model",
        "The installed vLLM does not know this architecture.",
    ),
    _rule(
        r"SafetensorError|UnpicklingError|must match the size of tensor|size mismatch"
        r"|shape mismatch|Cannot find any model weights|no module or parameter named"
        r"|shape invalid|assert .*loaded_weight",
        "invalid_checkpoint",
        "The model's files are damaged or contradict its config.",
        _AGAIN,
    ),
    _rule(
        r"trust_remote_code|trust-remote-code",
        "unsupported_model",
        "The model brings code of its own.",
        "It runs only with `trust_remote_code: true`.",
    ),
    _rule(
        r"RepositoryNotFoundError|is not a valid model identifier",
        "model_not_found",
        "There is no such model on the hub.",
        "Look at how its name is spelt; if it is a private one, give a token that may read it as "
        "`HF_TOKEN` or `hf_token`.",
    ),
    _rule(
        r"GatedRepoError|gated repo",
        "model_gated",
        "The model's owner must grant access.",
        "Ask for it on the model's page, and give your token as `HF_TOKEN` or `hf_token`.",
    ),
    _rule(
        r"LocalEntryNotFoundError|OfflineMode|ConnectError|ConnectionError|couldn't connect",
        "hub_unreachable",
        "A file of the model is not in the cache and the hub does not answer.",
        "Check the network, or give a local folder.",
    ),
    _rule(
        r"NotImplementedError|not supported|unsupported",
        "unsupported",
        "This engine, model or device cannot do what was asked.",
    ),
)


@contextlib.contextmanager
def load_errors(options: Mapping[str, Any]) -> Iterator[None]:
    """Turns every exception of a start into its ``BridgeError``.

    Args:
        options: engine options as the user gave them. Where they change the model's config, files
            that do not fit it may be as they should.
    """
    try:
        with map_exceptions(load_error):
            yield
    except BridgeError as error:
        overrides = options.get("hf_overrides")
        if error.reason == "invalid_checkpoint" and isinstance(overrides, dict) and overrides:
            error.remedy = (
                f"`hf_overrides` ({', '.join(overrides)}) changes what the model's config says, "
                "which may be all that is wrong: leave the option out. If the model does not load "
                f"without it either: {error.remedy[:1].lower()}{error.remedy[1:]}"
            )
            error.details["option"] = "hf_overrides"
        raise


def load_error(error: Exception) -> BridgeError:
    """The error for an exception at the start of an engine."""
    details: dict[str, Any] = {}
    type_name, text = type(error).__name__, str(error)
    loading = False
    if _MESSENGERS.search(text):
        lines, cause = _wait_for_root_cause()
        if lines:
            details["log"] = lines[-LOG_LINES:]
        if any("No space left on device" in line for line in lines[-_RECENT_LINES:]):
            return BridgeError(
                "load_failed",
                "The disk is full: a file that vLLM needed to write could not be written.",
                details,
                "Free some space (TMPDIR and ~/.cache are where it writes) and try again.",
            )
        if cause is not None:
            type_name, text = cause
            loading = any(_LOADS_WEIGHTS.search(line) for line in lines)
        elif lines:
            return _died(text, details)
    elif is_validation_error(error):
        text = _validation_text(error)
    elif not text:
        frames = traceback.extract_tb(error.__traceback__)
        text = (frames[-1].line if frames else None) or ""
    details["exception"] = f"{type_name}: {text}"
    words = readable(text) or type_name
    for rule in _RULES:
        if rule.pattern.search(f"{type_name}: {text}"):
            what = f"{rule.opening} vLLM says: {sentence(words)}"
            return BridgeError(rule.reason, what, details, rule.remedy)
    if loading:
        return BridgeError(
            "invalid_checkpoint",
            "The model's weights cannot be loaded: its files are damaged or contradict its "
            f"config. vLLM says: {sentence(words)}",
            details,
            _AGAIN,
        )
    if _is_of_tokenizer(error):
        return BridgeError(
            "invalid_checkpoint",
            f"The model's tokenizer cannot be loaded. The loader says: {sentence(words)}",
            details,
            "Copy its files (tokenizer.json and its kin) from where the model comes from, name "
            "another with `tokenizer`, or, to use token ids only, set `skip_tokenizer_init: true`.",
        )
    if is_validation_error(error) or isinstance(error, ValueError):
        from vllm_bridge.params import engine_fields

        if option := _mentioned(text, engine_fields()):
            details["option"] = option
        return BridgeError(
            "invalid_option", f"vLLM refuses these options: {sentence(words)}", details
        )
    details["traceback"] = traceback_of(error)
    return BridgeError(
        "load_failed", f"vLLM could not start the engine: {sentence(words)}", details
    )


def _died(text: str, details: dict[str, Any]) -> BridgeError:
    """The error for a process of vLLM's that ended without an exception: the next may not."""
    ends = {name: int(code) for name, code in _ENDED.findall(text)}
    how = ", ".join(f"{name}: {ranks.ended(code)}" for name, code in ends.items())
    what = f"A process of vLLM's ended while it started{how and f' ({how})'}, and no word why."
    remedy = ""
    if -signal.SIGKILL in ends.values():
        remedy = (
            "The system kills one when memory runs out: if it goes on, use a smaller or a "
            "quantized model, or a smaller KV cache."
        )
    # The end of the worker is the answer, and the log tells the rest.
    error = BridgeError("engine_dead", what, details, remedy)
    logger.error(error.message)
    return error


def request_error(
    error: Exception, max_model_len: int, names: Iterable[str], *, ended: bool = False
) -> BridgeError:
    """The error for an exception while a request is served.

    Args:
        error: what was raised
        max_model_len: the engine's
        names: of all sampling parameters, to find the one that vLLM's text is about
        ended: whether vLLM's handler of outputs has ended, and the engine with it. What it ended
            by is then the error of every request that was under way.
    """
    from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    trace = {"traceback": traceback_of(error)}  # of what is no fault of the caller's
    if isinstance(error, EngineGenerateError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    # A VLLMValidationError adds its parameter to its text, which is in the details already.
    text = str(error.args[0] if error.args else error)
    words = readable(text)
    if ended or isinstance(error, EngineDeadError):
        return BridgeError(
            "engine_dead", "vLLM's engine ended while the request was in flight.", trace
        )
    if isinstance(error, GracefulHTTPError):
        return BridgeError("overloaded", words)
    if _is_of_structured_outputs(error):
        return BridgeError(
            "invalid_option",
            f"vLLM cannot do what `structured_outputs` asks for: {words}",
            {"option": "structured_outputs"},
        )
    if not isinstance(error, VLLMClientError | ValueError | TypeError | OverflowError):
        return internal_error(error)
    if re.search(r"maximum context length|longer than the maximum model length", text) or (
        "maximum" in text and "model length of" in text
    ):
        return BridgeError(
            "prompt_too_long",
            f"The prompt does not fit into `max_model_len` ({max_model_len} tokens, of which at "
            f"least one is for the output). vLLM says: {words}",
            {"max_model_len": max_model_len},
        )
    if re.search(r"out of vocabulary|prompt cannot be empty|prompt is empty", text):
        return BridgeError("invalid_prompt", words)
    parameter = getattr(error, "parameter", None) or _mentioned(text, names)
    if isinstance(error, VLLMValidationError) or parameter:
        return BridgeError("invalid_option", words, {"option": parameter})
    return BridgeError("unsupported", words, {} if isinstance(error, VLLMClientError) else trace)


async def early_end(
    meaning: finish.Meaning, request_id: str, output: Any, *, structured: bool, asleep: bool
) -> BridgeError:
    """The error for a request that ended early.

    Args:
        request_id: the name that vLLM was given for it
        output: all that there is of it
        structured: whether the request asked for structured outputs
        asleep: whether the engine was put to sleep, which ends what is under way
    """
    details = {"outputs": _generated(output)}
    if meaning is finish.Meaning.CUT_OFF and asleep:
        return BridgeError(
            "aborted",
            "The engine was put to sleep while the request was in flight. Ask again when it has "
            "been woken up; `details` has what had been generated.",
            details,
        )
    if meaning is finish.Meaning.CUT_OFF:
        return BridgeError(
            "engine_dead",
            "vLLM's engine was stopped while the request was in flight. Ask again, or give the "
            "call `retry: true`; `details` has what had been generated.",
            details,
        )
    error = getattr(output, "error", None)
    words = error.message if error is not None else await logged_end(request_id)
    said = f" vLLM says: {words}" if words else ""
    if structured:
        return BridgeError(
            "invalid_option",
            "No token that the model may take goes on with what `structured_outputs` asks for, so "
            "vLLM ended the request. Change it: a pattern or schema that nothing matches, a schema "
            "that refers to itself without end, a construct that vLLM's grammar does not know, or "
            "parameters that rule its tokens out (`allowed_token_ids`, `logit_bias`, `bad_words`) "
            f"end like this.{said}",
            details | {"option": "structured_outputs"},
        )
    return BridgeError(
        "internal",
        "vLLM ended the request because of an error of its own; the engine goes on. Ask again, "
        f"and report it with the log if it happens each time.{said}",
        details,
    )


def _generated(output: Any) -> list[dict[str, Any]]:
    """What there is of each completion; nothing of what is pooled."""
    if not isinstance(output.outputs, list):
        return []
    return [
        {
            "index": completion.index,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        for completion in output.outputs
    ]


def is_validation_error(error: Exception) -> bool:
    import pydantic

    return isinstance(error, pydantic.ValidationError)


def log_lines() -> list[str]:
    """All lines of the worker's log, the file before the present one included; none outside the
    guard."""
    lines: list[str] = []
    if folder := os.environ.get(RUN_FOLDER):
        for name in ("log.1", "log"):
            with (
                contextlib.suppress(OSError),
                open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file,
            ):
                lines += file.read().splitlines()
    return lines


async def logged_end(request_id: str) -> str | None:
    """What vLLM's log says of a request that it ended itself; None where it says nothing.

    Args:
        request_id: the name that vLLM was given for it, or the beginning of the names of its parts
    """
    said = None
    deadline = time.monotonic() + _LOG_PATIENCE_SECONDS
    while said is None and time.monotonic() < deadline:
        await asyncio.sleep(_LOG_PAUSE_SECONDS)
        said = _last_said(request_id, log_lines())
    if said is not None:
        # The last of several lines tells the end, and may come a moment later.
        await asyncio.sleep(_LOG_PAUSE_SECONDS)
        said = _last_said(request_id, log_lines())
    return said


def _last_said(request_id: str, lines: list[str]) -> str | None:
    # vLLM adds something random to each name, and numbers those of several completions in front.
    named = re.compile(rf"\brequest (?:\d+_)?{re.escape(request_id)}-")
    for number in reversed(range(len(lines))):
        prefix = _LOG_PREFIX.match(lines[number])
        if prefix is not None and named.search(lines[number]):
            cause = root_cause(_record(prefix[0], lines[number:]))
            words = lines[number][prefix.end() :]
            return readable(f"{words}: {cause[1] or cause[0]}" if cause else words)
    return None


def _record(head: str, lines: Iterable[str]) -> Iterator[str]:
    """The first of ``lines``, as far as they were logged at once, a traceback say: these begin
    alike."""
    return itertools.takewhile(lambda line: line.startswith(head), lines)


def root_cause(lines: Iterable[str]) -> tuple[str, str] | None:
    """The exception that a child process ended with, as its type and its text.

    Where several processes failed, the first of them has the cause; of its exceptions, chained
    as they may be, the last says most.
    """
    process = cause = None
    source = ""
    for line in lines:
        prefix = _LOG_PREFIX.match(line)
        if prefix is None or (process is not None and prefix["process"] != process):
            continue
        text = line[prefix.end() :]
        found = _EXCEPTION.match(text)
        if found is not None and not _MESSENGERS.search(line):
            process = prefix["process"]
            # An assertion without words says its own line, which is above it.
            cause = (found["type"].rpartition(".")[2], found["text"] or source)
        elif text.strip(" ^~"):
            source = text.strip() if text.startswith("    ") else ""
    return cause


def _is_of_structured_outputs(error: Exception) -> bool:
    """Whether something that reads the structure that an output is to have raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("structured_output" in frame.name + frame.filename for frame in frames)


def _is_of_tokenizer(error: Exception) -> bool:
    """Whether something that loads tokenizers raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("tokeniz" in os.path.basename(frame.filename) for frame in frames)


def _wait_for_root_cause() -> tuple[list[str], tuple[str, str] | None]:
    deadline = time.monotonic() + _LOG_PATIENCE_SECONDS
    while True:
        lines = log_lines()
        cause = root_cause(lines)
        if cause is not None or not lines or time.monotonic() > deadline:
            return lines, cause
        time.sleep(_LOG_PAUSE_SECONDS)


def _validation_text(error: Any) -> str:
    return "; ".join(map(_fault, error.errors()))


def _fault(item: Mapping[str, Any]) -> str:
    said: str = item["msg"].removeprefix("Value error, ")
    place = ".".join(map(str, item["loc"]))
    # vLLM's own words say what they are about, those of the library that it checks types with
    # do not.
    return said if item["type"] == "value_error" or not place else f"`{place}`: {said}"


def _mentioned(text: str, names: Iterable[str]) -> str | None:
    """The first of ``names`` that a text is about, also as a command line flag."""
    known = set(names)
    words = (match[0].replace("-", "_") for match in re.finditer(r"\b[a-z][a-z0-9_-]*", text))
    return next((word for word in words if word in known), None)


def sentence(text: str) -> str:
    """A text that others may follow."""
    return text.rstrip(". ") + "."


def readable(text: str) -> str:
    """vLLM's words for people who never see its command line."""
    text = re.sub(r"--([a-z0-9]+(?:-[a-z0-9]+)+)", lambda m: m[1].replace("-", "_"), text)
    text = " ".join(text.split())
    if len(text) > _MAX_TEXT:
        text = text[:_MAX_TEXT].rsplit(" ", 1)[0] + " …"
    return text
