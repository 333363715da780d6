"""What a worker can do: its methods, each with the type of its params and what serves it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from vllm_bridge.rpc.call import Call

P = TypeVar("P", bound=msgspec.Struct)


class NoParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of methods that take none."""


@dataclass(frozen=True, slots=True)
class Method(Generic[P]):
    """One method.

    Args:
        params: what the map of the request becomes before ``serve`` gets it. Unknown keys and
            wrong types are refused with their names.
        serve: gives the result, or raises the ``BridgeError`` that is the answer
    """

    params: type[P]
    serve: Callable[[Call, P], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Table:
    """A kind of worker.

    Args:
        methods: by their names on the wire; ``hello`` is the server's own
        progress: the figures that a ``pong`` tells beside its number
        exit_summary: how the processes below this one ended, for the log, when they took the
            worker with them; empty where that is not known
    """

    methods: Mapping[str, Method[Any]]
    progress: Callable[[], dict[str, int]] = dict
    exit_summary: Callable[[], str] = str
