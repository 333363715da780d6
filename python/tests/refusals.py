"""Holds ``check`` to what the tests know: wherever one of them meets what keeps an engine from
starting, the worker's answer to ``check`` must have it too, word for word.

``watch`` has to be called before a test imports what it wraps.
"""

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from vllm_bridge.errors import BridgeError

_T = TypeVar("_T")

# Names of the tests, without their parameters, whose refusals by vLLM's config were compared: such
# a config takes a while, and each of a test's refusals comes from the same place.
_compared: set[str] = set()

_is_asking = False


def watch() -> None:
    """Wraps the steps of a start that refuse."""
    from vllm_bridge.checkpoints import models
    from vllm_bridge.engine import plan

    plan.plan = _watched(plan.plan, _plan_error)

    from vllm_bridge.engine import check

    models.check_model = _raising(models.check_model)
    check.check = _watched(check.check, _config_error)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Nothing is asked again within, for tests that count."""
    global _is_asking
    _is_asking = True
    try:
        yield
    finally:
        _is_asking = False


def _plan_error(planned: Any) -> BridgeError | None:
    from vllm_bridge.engine.finding import errors

    return next((finding.error() for finding in errors(planned.findings)), None)


def _config_error(checked: Any) -> BridgeError | None:
    name = os.environ["PYTEST_CURRENT_TEST"].partition("[")[0]
    if _plan_error(checked.plan) is not None or name in _compared:
        return None
    _compared.add(name)
    return _plan_error(checked)


def _watched(original: Callable[..., Any], error_of: Callable[[Any], BridgeError | None]) -> Any:
    def watched(model: str, options: Mapping[str, Any], *rest: Any, **others: Any) -> Any:
        found = original(model, options, *rest, **others)
        is_here = others.get("is_here", others.get("machine") is None)
        if is_here and not _is_asking and (error := error_of(found)) is not None:
            said = _ask(model, options, others.get("devices"))
            first = next(found for found in said if found["severity"] == "error")
            assert first == _said(error)
        return found

    return watched


def _raising(original: Callable[..., Any]) -> Any:
    """As ``_watched``, of a step that is one of several: its error need not be the first."""

    def watched(model: str, options: Mapping[str, Any], *rest: Any) -> Any:
        try:
            return original(model, options, *rest)
        except BridgeError as raised:
            error = raised
        assert _is_asking or _said(error) in _ask(model, options)
        raise error

    return watched


def _said(error: BridgeError) -> dict[str, Any]:
    """An error of ``load``, as a finding has it."""
    wire = error.to_wire()
    remedy = wire["details"].pop("remedy", "")
    said = wire["message"].removesuffix(remedy).rstrip()
    return _lasting(_sent({"severity": "error"} | wire | {"message": said, "remedy": remedy}))


def _ask(
    model: str, options: Mapping[str, Any], devices: list[str | int] | None = None
) -> list[dict[str, Any]]:
    """What the worker answers, in a thread without a loop of its own yet."""
    from vllm_bridge.tools import quantization
    from vllm_bridge.tools.model import MachineParams

    answers: list[dict[str, Any]] = []

    def ask() -> None:
        params = MachineParams(model, dict(options), devices=None if devices is None else [devices])
        answers.append(asyncio.run(quantization.check(None, params)))  # type: ignore[arg-type]

    with unwatched():
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert not answers[0]["ok"]
    return list(map(_lasting, _sent(answers[0]["findings"])))


def _lasting(said: dict[str, Any]) -> dict[str, Any]:
    """Without what is another a moment later: how much memory is left."""
    if "available_bytes" not in said["details"]:
        return said
    details = said["details"] | {"available_bytes": None}
    return said | {
        "message": re.sub(r"[\d.]+ GiB of", "GiB of", said["message"]),
        "details": details,
    }


def _sent(value: _T) -> _T:
    """A value as it arrives."""
    arrived: _T = msgspec.msgpack.decode(msgspec.msgpack.encode(value))
    return arrived
