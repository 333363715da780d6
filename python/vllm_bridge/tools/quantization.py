"""What there is to know of quantization before an engine is started.

What takes long runs in a thread, so that the worker hears of it when nobody waits any more.
"""

import asyncio
from typing import Any

from vllm_bridge.rpc.call import Call
from vllm_bridge.rpc.table import NoParams
from vllm_bridge.tools.model import MachineParams, ModelParams


async def quantization(_call: Call, _params: NoParams) -> dict[str, list[str]]:
    """What the installed vLLM computes on this device. Blocks for the seconds of its import."""
    from vllm.plugins import load_general_plugins

    from vllm_bridge.quantization import availability

    load_general_plugins()
    return {"formats": list(availability.formats()), "online": list(availability.online())}


async def detect(_call: Call, params: ModelParams) -> dict[str, Any]:
    """How a model is quantized."""
    from vllm_bridge.checkpoints.detect import detect

    return (await asyncio.to_thread(detect, params.model, params.options)).to_wire()


async def check(_call: Call, params: MachineParams) -> dict[str, Any]:
    """What would keep an engine from starting, and what it would be."""
    from vllm_bridge.engine import facts
    from vllm_bridge.engine.check import check

    return facts.report(await asyncio.to_thread(check, params.model, params.options))


METHODS: dict[str, Any] = {
    "quantization": (NoParams, quantization),
    "detect": (ModelParams, detect),
    "check": (MachineParams, check),
}
