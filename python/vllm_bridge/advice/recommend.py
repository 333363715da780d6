"""What ``VLLM.Quantization.recommend`` answers."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from vllm_bridge.advice import candidates, hub, ranking
from vllm_bridge.advice.ranking import Candidate, Choice, Room, RuledOut, Target
from vllm_bridge.advice.rules import Format, Goal, Rules, rules
from vllm_bridge.checkpoints import detect
from vllm_bridge.checkpoints.detect import Detected
from vllm_bridge.engine.finding import errors
from vllm_bridge.engine.plan import Plan, plan
from vllm_bridge.errors import BridgeError, nearest
from vllm_bridge.hub import names
from vllm_bridge.sizing import devices as machines
from vllm_bridge.sizing import kv_cache
from vllm_bridge.sizing.devices import Device
from vllm_bridge.sizing.estimate import estimate

# What is said against the format that the model has; another may have none of it. Whether it fits
# is counted here, for the devices and the context that are asked about.
_OF_THE_FORMAT: Final = ("unsupported_quantization", "out_of_memory")

# Tokens for which there is to be room in the KV cache, where the user names no other number. What
# models can take is often more than anybody's devices have room for.
_CONTEXT: Final = 8192

# What an estimate has of each device beside the weights.
_BESIDE: Final = ("kv_cache", "activations", "framework", "adapters", "draft")


def recommend(
    model: str,
    options: Mapping[str, Any],
    goal: str | None = None,
    devices: Sequence[Device] | None = None,
    is_searched: bool = False,
) -> dict[str, Any]:
    """The formats of a model that suit, the best first; see guides/protocol.md. Imports vLLM.

    Args:
        options: of the engine that it is for, as the user gave them
        goal: one of the rules'; None for that of the device
        devices: what it is to run on; None for what is here
        is_searched: whether the hub is asked for repositories

    Raises:
        BridgeError: the reason why the model cannot run in any format; ``invalid_option``
    """
    known = rules()
    found = machines.here() if devices is None else tuple(devices)
    wanted = _goal(goal, found[0], known)
    planned = plan(model, options)
    for finding in errors(planned.findings):
        if finding.reason not in _OF_THE_FORMAT:
            raise finding.error()
    detected = detect.of(planned.checkpoint)
    own, *made = candidates.of(planned, detected, found[0].kind, known)
    offered = [own._replace(refusal=_refusal(planned)), *made]
    notes = list(_notes(planned, detected))
    if is_searched and (base := _on_hub(model, detected)) is not None:
        try:
            offered = _with_hub(offered, base, options, known)
        except BridgeError as error:
            notes.append(f"The hub was not searched. {error.message}")
    from vllm_bridge.advice import running  # imports vLLM

    offered = running.refused(offered, found, devices is None)
    target = target_of(planned, found)
    choices, out = ranking.rank(offered, wanted, target, detected.parameters or 0, known)
    return {
        "model": model,
        "goal": wanted.name,
        "device": target.name,
        "weights": dict(wanted.weights),
        "choices": [_choice(choice, known) for choice in choices],
        "ruled_out": [_ruled_out(one) for one in out],
        "notes": notes,
        "picture": ranking.picture(model, wanted, target, choices, out),
    }


def _refusal(planned: Plan) -> str:
    """Why the model as it is cannot run anywhere; empty where nothing is known against it."""
    found = (one for one in errors(planned.findings) if one.reason == "unsupported_quantization")
    return next((one.message for one in found), "")


def _goal(asked: str | None, device: Device, known: Rules) -> Goal:
    if asked is None:
        return known.goals["cpu" if device.kind == "cpu" else "throughput"]
    name = asked.strip().lower().replace("-", "_")
    if name in known.goals:
        return known.goals[name]
    near = nearest(name, known.goals)
    raise BridgeError(
        "invalid_option",
        f"No goal `{asked}` is known.",
        {"option": "for", "value": asked, "allowed": list(known.goals), "nearest": near},
        remedy=f"Give one of {', '.join(known.goals)}.",
    )


def _context(planned: Plan) -> Mapping[str, Any]:
    """The options with a context for which there is to be room."""
    if planned.options.get("max_model_len") is not None:
        return planned.options
    longest = kv_cache.max_length(planned.checkpoint.config, {})
    return {**planned.options, "max_model_len": min(longest, _CONTEXT)}


def target_of(planned: Plan, devices: Sequence[Device]) -> Target:
    """What a model is to run on, with the room that these devices have for it."""
    sizes = estimate(dataclasses.replace(planned, options=_context(planned)), devices)["devices"]
    room = Room(
        total=sum(size["budget"] for size in sizes),
        beside=sum(size[name] for size in sizes for name in _BESIDE),
    )
    known = [device.capability for device in devices if device.capability is not None]
    names = [device.name for device in devices]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return Target(
        name=" + ".join(
            f"{count} x {name}" if count > 1 else name for name, count in counts.items()
        ),
        kind=devices[0].kind,
        # Where they differ, what runs on all of them counts.
        capability=min(known, default=None),
        room=room,
    )


def _on_hub(model: str, detected: Detected) -> str | None:
    """The plain model that others are made of, as the hub calls it."""
    if detected.method is not None:
        return None
    name = None if os.path.exists(model) else names.parse(model)
    return detected.base_model if name is None else name.id


def _with_hub(
    offered: Sequence[Candidate], base: str, options: Mapping[str, Any], known: Rules
) -> list[Candidate]:
    ways = hub.ways(base, options, known)
    found = []
    for candidate in offered:
        there = ways.get(candidate.name)
        # What needs nothing to be made comes first.
        at = sum(way.kind in ("as_is", "in_flight") for way in candidate.ways)
        more = () if there is None else (there,)
        found.append(candidate._replace(ways=(*candidate.ways[:at], *more, *candidate.ways[at:])))
    return found


def _notes(planned: Plan, detected: Detected) -> Iterator[str]:
    if planned.options.get("max_model_len") is None:
        tokens = _context(planned)["max_model_len"]
        longest = kv_cache.max_length(planned.checkpoint.config, {})
        yield (
            f"Counted with a context of {tokens:,} tokens for one request"
            + (f" (the model takes up to {longest:,})" if longest > tokens else "")
            + ". Give max_model_len for another."
        )
    if detected.method is not None:
        other = detected.base_model or "the plain model"
        yield (
            "The model is quantized already, and this is the only format of it. Ask about "
            f"{other} to compare others."
        )


def _choice(choice: Choice, known: Rules) -> dict[str, Any]:
    candidate, speed = choice.candidate, choice.speed
    return {
        "format": candidate.name,
        "method": candidate.method,
        "disk": candidate.disk,
        "memory": candidate.memory,
        "needs": choice.needs,
        "score": choice.score,
        "marks": dict(choice.marks),
        "loss": None if choice.rule is None else _loss(choice.rule, known),
        "speed": speed
        and {
            "one": speed.one,
            "many": speed.many,
            "source": known.sources[speed.source]._asdict(),
            "many_source": known.sources[speed.many_source]._asdict(),
        },
        "reasons": list(choice.reasons),
        "ways": [
            {"kind": way.kind, "model": way.model, "options": dict(way.options), "text": way.text}
            for way in candidate.ways
        ],
    }


def _loss(rule: Format, known: Rules) -> dict[str, Any]:
    loss = rule.loss
    return {
        "class": loss.name,
        "metric": loss.metric,
        "value": loss.value,
        "words": loss.words,
        "source": known.sources[loss.source]._asdict(),
    }


def _ruled_out(one: RuledOut) -> dict[str, Any]:
    return {
        "format": one.candidate.name,
        "why": one.why,
        "needs": one.needs,
        "message": one.message,
    }
