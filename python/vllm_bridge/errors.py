"""The one error that leaves this package, and how other people's exceptions become it."""

import difflib
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from vllm_bridge.redaction import redact, redact_all

# The same names as in lib/vllm/error/reasons.ex; a test compares the two.
REASONS: Final = frozenset(
    {
        # What the caller gave
        "invalid_option",
        "invalid_prompt",
        "prompt_too_long",
        "unsupported",
        # Models
        "not_allowed",
        "model_not_found",
        "not_a_model",
        "model_gated",
        "hub_unreachable",
        "hub_unauthorized",
        "rate_limited",
        "download_corrupt",
        "disk_full",
        "cache_not_writable",
        "in_use",
        "unsupported_model",
        "unsupported_quantization",
        "invalid_checkpoint",
        "out_of_memory",
        # The worker and its surroundings
        "python_not_found",
        "vllm_not_installed",
        "quantize_not_installed",
        "vllm_version",
        "load_failed",
        "load_timeout",
        "engine_dead",
        "failed",
        "not_running",
        "node_down",
        "node_incompatible",
        "shutdown",
        # Requests
        "timeout",
        "queue_timeout",
        "poison",
        "overloaded",
        "aborted",
        # Jobs
        "job_not_found",
        "job_running",
        "job_interrupted",
        "name_taken",
        "not_verified",
        "source_changed",
        "step_died",
        # Faults of our own making
        "protocol",
        "internal",
    }
)


class BridgeError(Exception):
    """An error as the other side gets it.

    Args:
        reason: one of ``REASONS``
        what: a sentence or two for people who need not know Python: what is the matter. What to
            do about it may be in it too, where the two are one thing.
        details: what a program or a bug report wants to know
        remedy: what to do about it: a sentence, or nothing
    """

    def __init__(
        self, reason: str, what: str, details: dict[str, Any] | None = None, remedy: str = ""
    ) -> None:
        assert reason in REASONS, reason  # noqa: S101 - a fault of ours, not of the caller's
        super().__init__(what, remedy)
        self.reason = reason
        self.what = what
        self.details = details or {}
        self.remedy = remedy.rstrip()  # of a question that nothing follows

    @property
    def message(self) -> str:
        """All that is said to people."""
        return f"{self.what} {self.remedy}".strip()

    def __str__(self) -> str:
        return self.message

    def to_wire(self) -> dict[str, Any]:
        details = self.details | ({"remedy": self.remedy} if self.remedy else {})
        return {
            "reason": self.reason,
            "message": redact(self.message),
            "details": redact_all(details),
        }


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be, in whatever case."""
    names = {each.lower(): each for each in known}
    matches = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return names[matches[0]] if matches else None


def did_you_mean(suggestion: str | None) -> str:
    """The question that a remedy begins with, where something may have been meant."""
    return f"Did you mean `{suggestion}`? " if suggestion else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> BridgeError:
    """The error for a name that nobody knows, with the one that was probably meant."""
    suggestion = nearest(name, known)
    return BridgeError(
        "invalid_option",
        f"Unknown {kind} `{name}`.",
        {"option": name, "nearest": suggestion},
        remedy=did_you_mean(suggestion),
    )


def traceback_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def internal_error(error: BaseException) -> BridgeError:
    """For what nobody foresaw."""
    return BridgeError(
        "internal",
        f"A fault in the worker ({type(error).__name__}); please report it with `details`.",
        {"exception": f"{type(error).__name__}: {error}", "traceback": traceback_of(error)},
    )


@contextmanager
def map_exceptions(translate: Callable[[Exception], BridgeError]) -> Iterator[None]:
    """Turns every exception of the body into the ``BridgeError`` that ``translate`` makes of it."""
    try:
        yield
    except BridgeError:
        raise
    except Exception as error:
        raise translate(error) from error
