"""Fine-tuning: LoRA adapters, trained with peft and transformers' Trainer in the serving
environment with the extra ``finetune``.

``train`` has the way of a training; ``options`` what can be said of it, ``data`` what it is trained
on, ``base`` the model under it, ``packed`` the layers of AWQ's and GPTQ's.
"""

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from vllm_bridge.jobs import task
from vllm_bridge.rpc.call import Call


class CheckParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``check_finetune``; see guides/protocol.md.

    Args:
        engine: options of an engine, which say where the model is
    """

    model: str
    data: Any
    options: dict[str, Any] = {}
    engine: dict[str, Any] = {}


class FinetuneParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``finetune``; see guides/protocol.md."""

    model: str
    data: Any
    out: str
    states: str
    options: dict[str, Any] = {}
    base: str | None = None


class MergeParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``merge``; see guides/protocol.md."""

    model: str
    adapter: str
    out: str


async def check_finetune(_call: Call, params: CheckParams) -> dict[str, Any]:
    """Whether a training can be begun, what it will be, and what it would take."""

    def checked() -> dict[str, Any]:
        from vllm_bridge.jobs import foreseen
        from vllm_bridge.jobs.finetune import estimate
        from vllm_bridge.jobs.finetune.plan import Plan

        plan = Plan(params.model, params.data, params.options, params.engine)
        return estimate.told(plan) | estimate.to_wire(estimate.outputs(plan, foreseen.here()))

    return await asyncio.to_thread(checked)


async def finetune(call: Call, params: FinetuneParams) -> dict[str, Any]:
    """Trains an adapter."""

    def trained(tell: task.Telling) -> dict[str, Any]:
        from vllm_bridge.jobs.finetune.plan import Plan
        from vllm_bridge.jobs.finetune.train import train

        plan = Plan(params.model, params.data, params.options)
        return train(plan, Path(params.out), Path(params.states), tell, params.base)

    return await task.run(call, trained)


async def merge(call: Call, params: MergeParams) -> dict[str, Any]:
    """Merges an adapter into its base."""

    def merged(tell: task.Telling) -> dict[str, Any]:
        from vllm_bridge.jobs.finetune.merge import merge

        return merge(params.model, params.adapter, Path(params.out), tell)

    return await task.run(call, merged)


METHODS: dict[str, Any] = {
    "check_finetune": (CheckParams, check_finetune),
    "finetune": (FinetuneParams, finetune),
    "merge": (MergeParams, merge),
}
