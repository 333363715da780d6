"""What is found out about a model and the options before it is loaded."""

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import ghost

# What is good to know and no error: what kind of model it is, what only the device can tell, and
# what is made of the model before it is loaded.
NOTES: Final = frozenset({"family", "device", "isq"})


class Finding(NamedTuple):
    """Something about the model or the options that a user should know.

    Args:
        severity: ``"error"`` for what keeps the engine from starting
        reason: one of ``errors.REASONS``; with the severity ``"info"`` also one of ``NOTES``
        message: what is the matter
        details: what a program wants to know of it
        remedy: what to do about it: a sentence, or nothing
    """

    severity: Literal["error", "warning", "info"]
    reason: str
    message: str
    details: Mapping[str, Any] = {}
    remedy: str = ""

    @classmethod
    def of(cls, error: BridgeError, severity: Literal["error", "warning"] = "error") -> "Finding":
        """What keeps an engine from starting, or may be a mistake."""
        error = ghost.named(error)
        return cls(severity, error.reason, error.what, error.details, error.remedy)

    @property
    def text(self) -> str:
        """All that is said to people."""
        return f"{self.message} {self.remedy}".strip()

    def error(self) -> BridgeError:
        return BridgeError(self.reason, self.message, dict(self.details), self.remedy)


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Those that keep the engine from starting, in the order in which they would be met."""
    return [finding for finding in findings if finding.severity == "error"]
