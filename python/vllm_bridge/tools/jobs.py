"""What jobs are told before they start."""

import asyncio
from typing import Any

import msgspec

from vllm_bridge.rpc.call import Call


class PlanQuantizeParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``plan_quantize``; see guides/protocol.md.

    Args:
        outputs: formats, each with all of its options and the tokens of calibration texts that it
            reads, as ``quantize_formats`` tells them
        options: of an engine, which say where the model is
        verify: whether the time of all together is with their verification
    """

    model: str
    outputs: list[tuple[str, dict[str, Any], int]]
    options: dict[str, Any] = {}
    verify: bool = False


async def plan_quantize(_call: Call, params: PlanQuantizeParams) -> dict[str, Any]:
    """What disk, memory and time quantizing a model would take, and what memory to measure the
    model and each output."""
    return await asyncio.to_thread(_plan, params)


def _plan(params: PlanQuantizeParams) -> dict[str, Any]:
    from vllm_bridge.checkpoints import detect, models
    from vllm_bridge.jobs import foreseen, measure
    from vllm_bridge.jobs.quantize import estimate

    checkpoint = models.look_at(models.locate(params.model, params.options), params.options)
    here = foreseen.here()
    each = estimate.of(checkpoint, params.model, params.outputs, here)
    verification = (
        estimate.verification(checkpoint, len(each), here) if params.verify else (0.0, 0.0)
    )
    return {
        "outputs": [
            one.to_wire()
            | {
                "verification": measure.memory(one.bytes),
                "usual_kl": estimate.usual_kl(form, options),
            }
            for one, (form, options, _tokens) in zip(each, params.outputs, strict=True)
        ],
        "together": foreseen.together(each, verification).to_wire(),
        "verification": measure.memory(detect.of(checkpoint).bytes or 0),
    }


METHODS: dict[str, Any] = {"plan_quantize": (PlanQuantizeParams, plan_quantize)}
