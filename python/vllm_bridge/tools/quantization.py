"""What there is to know of quantization before an engine is started.

What takes long runs in a thread, so that the worker hears of it when nobody waits any more.
"""

import asyncio
from typing import Any

import msgspec

from vllm_bridge.rpc.call import Call
from vllm_bridge.rpc.table import NoParams
from vllm_bridge.tools.model import MachineParams, ModelParams


async def methods(_call: Call, _params: NoParams) -> list[dict[str, Any]]:
    """The methods of the installed vLLM, and what of them runs on this device."""
    from vllm_bridge.quantization import table

    return [row.to_wire() for row in await asyncio.to_thread(table.rows)]


async def detect(_call: Call, params: ModelParams) -> dict[str, Any]:
    """How a model is quantized."""
    from vllm_bridge.checkpoints.detect import detect

    return (await asyncio.to_thread(detect, params.model, params.options)).to_wire()


async def check(_call: Call, params: MachineParams) -> dict[str, Any]:
    """What would keep an engine from starting, and what it would be."""
    from vllm_bridge.engine import facts
    from vllm_bridge.engine.check import check

    machine = params.machine()
    checked = await asyncio.to_thread(
        check, params.model, params.options, devices=params.visible(), machine=machine
    )
    return facts.report(checked, machine)


class EstimateParams(MachineParams, forbid_unknown_fields=True):
    """The same as ``MachineParams``, and how many requests are to fit at a time."""

    concurrency: int | None = None


async def estimate(_call: Call, params: EstimateParams) -> dict[str, Any]:
    """How much memory an engine would take, and whether it fits."""
    return await asyncio.to_thread(_estimate, params)


def _estimate(params: EstimateParams) -> dict[str, Any]:
    from vllm_bridge.engine.plan import plan
    from vllm_bridge.sizing import devices
    from vllm_bridge.sizing.estimate import estimate

    machine = params.machine() or devices.here()
    wishes = {"concurrency": params.concurrency}
    return estimate(plan(params.model, params.options), machine, wishes)


class RecommendParams(MachineParams, forbid_unknown_fields=True):
    """The params of ``recommend``; see guides/protocol.md."""

    goal: str | None = msgspec.field(name="for", default=None)
    search: bool = False


async def recommend(_call: Call, params: RecommendParams) -> dict[str, Any]:
    """Which formats of a model suit a purpose and a device. Imports vLLM."""
    from vllm_bridge.advice.recommend import recommend

    return await asyncio.to_thread(
        recommend, params.model, params.options, params.goal, params.machine(), params.search
    )


METHODS: dict[str, Any] = {
    "methods": (NoParams, methods),
    "detect": (ModelParams, detect),
    "check": (MachineParams, check),
    "estimate": (EstimateParams, estimate),
    "recommend": (RecommendParams, recommend),
}
