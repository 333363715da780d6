"""The order of the formats of a model for a goal on a device, by ``rules``.

Each candidate gets marks from 0 to 1: its quality by the class of its loss, its speed relative to
the fastest of those that are left, its memory as the smallest over its own. A goal's weights make
one number of them. What cannot run or does not fit is told apart and never ranked.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from vllm_bridge.advice.rules import Format, Goal, Loss, Mark, Rules, Speed
from vllm_bridge.memory import gib

_MARKS: Final[Mapping[Mark, str]] = {
    "quality": "quality",
    "one": "the speed of one sequence",
    "many": "the speed of many",
    "memory": "little memory",
    "training": "the speed of training",
}


class Way(NamedTuple):
    """A way to have a format.

    Args:
        kind: ``"as_is"``, ``"in_flight"`` (of the plain model, while it loads), ``"hub"`` (somebody
            has made it) or ``"make"``
        model: what to load
        options: to load it with
        text: the same in words
    """

    kind: Literal["as_is", "in_flight", "hub", "make"]
    model: str
    options: Mapping[str, Any]
    text: str


class Candidate(NamedTuple):
    """A format that the model has or can have.

    Args:
        name: of the format, as ``rules`` has it
        method: vLLM's name of it; None for a plain model
        disk: bytes of its weights in files
        memory: bytes of them once they are loaded
        ways: to have it
        refusal: why it cannot run on the device; empty where it can
    """

    name: str
    method: str | None
    disk: int
    memory: int
    ways: tuple[Way, ...] = ()
    refusal: str = ""


class Room(NamedTuple):
    """The memory of the devices, of all together.

    Args:
        total: bytes that the engine may take
        beside: bytes of it that other things than weights need
    """

    total: int
    beside: int


class Target(NamedTuple):
    """What a model is to run on.

    Args:
        name: for people
        kind: of vLLM's platforms
        capability: the compute capability, where there is one
        room: in its memory
    """

    name: str
    kind: str
    capability: tuple[int, int] | None
    room: Room


class Choice(NamedTuple):
    """A candidate that is recommended.

    Args:
        score: what the goal's weights make of the marks, from 0 to 1
        marks: each from 0 to 1
        speed: None where no rule is for the format on this device
        needs: bytes of memory in all
        reasons: sentences
    """

    candidate: Candidate
    rule: Format | None
    score: float
    marks: Mapping[Mark, float]
    speed: Speed | None
    needs: int
    reasons: tuple[str, ...]


class RuledOut(NamedTuple):
    """A candidate that is not recommended.

    Args:
        why: ``"cannot_run"``, ``"does_not_fit"`` or ``"not_for_the_goal"``
        message: a sentence
    """

    candidate: Candidate
    why: Literal["cannot_run", "does_not_fit", "not_for_the_goal"]
    needs: int
    message: str


def rank(
    candidates: Sequence[Candidate], goal: Goal, target: Target, parameters: int, rules: Rules
) -> tuple[list[Choice], list[RuledOut]]:
    """The candidates that suit, the best first, and the others with the reason.

    Args:
        parameters: of the model
    """
    left, out = [], []
    for candidate in candidates:
        needs = _needs(candidate, goal, target.room, parameters, rules)
        refused = _ruled_out(candidate, needs, goal, target, rules)
        if refused is None:
            left.append((candidate, needs))
        else:
            out.append(refused)
    speeds = {
        candidate.name: rules.speed(candidate.name, target.kind, target.capability)
        for candidate, _ in left
    }
    choices = [
        _choice(candidate, needs, goal, rules, speeds, [other.memory for other, _ in left])
        for candidate, needs in left
    ]
    choices.sort(key=lambda choice: (-choice.score, _order(choice.rule)))
    return choices, out


def _needs(candidate: Candidate, goal: Goal, room: Room, parameters: int, rules: Rules) -> int:
    rule = rules.formats.get(candidate.name)
    if "training" in goal.weights and rule is not None and rule.training is not None:
        return int(rule.training.bytes * parameters)
    return candidate.memory + room.beside


def _ruled_out(
    candidate: Candidate, needs: int, goal: Goal, target: Target, rules: Rules
) -> RuledOut | None:
    if candidate.refusal:
        return RuledOut(candidate, "cannot_run", needs, candidate.refusal)
    rule = rules.formats.get(candidate.name)
    if "training" in goal.weights and (rule is None or rule.training is None):
        return RuledOut(
            candidate,
            "not_for_the_goal",
            needs,
            "Adapters are trained over 16 bits or over bitsandbytes' 4 (QLoRA); what was trained "
            "there loads over this format as well.",
        )
    if needs > target.room.total:
        return RuledOut(
            candidate,
            "does_not_fit",
            needs,
            f"It needs {gib(needs)} in all, and {target.name} has {gib(target.room.total)} for it.",
        )
    return None


def _choice(
    candidate: Candidate,
    needs: int,
    goal: Goal,
    rules: Rules,
    speeds: Mapping[str, Speed | None],
    sizes: Sequence[int],
) -> Choice:
    rule = rules.formats.get(candidate.name)
    speed = speeds[candidate.name]
    marks = {
        "quality": rule.loss.mark if rule else 0.5,
        "one": _one(speed) / max(map(_one, speeds.values())),
        "many": _many(speed) / max(map(_many, speeds.values())),
        "memory": min(sizes) / candidate.memory if candidate.memory else 1.0,
        "training": rule.training.speed if rule and rule.training else 0.0,
    }
    # Coarse, as figures of other models are, and so that sizes which differ by little are equal.
    marks = {name: round(mark, 2) for name, mark in marks.items()}
    score = sum(weight * marks[name] for name, weight in goal.weights.items())
    return Choice(
        candidate,
        rule,
        round(score, 2),
        {name: marks[name] for name in goal.weights},
        speed,
        needs,
        tuple(_reasons(candidate, rule, speed, goal, rules)),
    )


def _one(speed: Speed | None) -> float:
    return speed.one if speed else 1.0


def _many(speed: Speed | None) -> float:
    return speed.many if speed else 1.0


def _reasons(
    candidate: Candidate, rule: Format | None, speed: Speed | None, goal: Goal, rules: Rules
) -> Iterator[str]:
    if rule is None:
        yield "What it loses in quality is not known to the rules: compare it with the plain model."
    elif rule.loss.name == "none":
        yield "It loses no quality."
    else:
        source = rules.sources[rule.loss.source].title + _derived(rule.loss)
        yield f"Loss of quality {rule.loss.words} ({source})."
    if "training" in goal.weights:
        if rule is not None and rule.training is not None:
            source = rules.sources[rule.training.source].title
            yield (
                f"Training takes {rule.training.bytes:g} bytes for each parameter and is "
                f"{rule.training.speed:g} times as fast as over 16 bits ({source})."
            )
    elif candidate.method is not None:
        yield from _of_speed(speed, rules)
    if rule is not None and rule.note:
        yield f"{rule.note[0].upper()}{rule.note[1:]}."


def _of_speed(speed: Speed | None, rules: Rules) -> Iterator[str]:
    if speed is None:
        yield "Its speed on this device is not known to the rules; it is ranked as 16 bits are."
        return
    one, many = (rules.sources[name].title for name in (speed.source, speed.many_source))
    note = (f"; {speed.note}" if speed.note else "") + _derived(speed)
    if one == many:
        yield (
            f"{speed.one:g} times the speed of 16 bits for one sequence, {speed.many:g} times for "
            f"many ({one}{note})."
        )
    else:
        yield (
            f"{speed.one:g} times the speed of 16 bits for one sequence ({one}), {speed.many:g} "
            f"times for many ({many}{note})."
        )


def _derived(figure: Loss | Speed) -> str:
    return f"; derived: {figure.derived}" if figure.derived else ""


def picture(
    model: str,
    goal: Goal,
    target: Target,
    choices: Sequence[Choice],
    out: Sequence[RuledOut],
) -> str:
    """How it was decided, as a tree for people."""
    count = len(choices) + len(out)
    weights = ", ".join(f"{weight:.0%} {_MARKS[name]}" for name, weight in goal.weights.items())
    groups = [
        ("cannot run there", [one for one in out if one.why == "cannot_run"]),
        ("not for this goal", [one for one in out if one.why == "not_for_the_goal"]),
        ("too large", [one for one in out if one.why == "does_not_fit"]),
    ]
    lines = [f"{model} on {target.name}: {count} {'format' if count == 1 else 'formats'}"]
    lines += [
        f"├─ {len(group)} {words}: {', '.join(one.candidate.name for one in group)}"
        for words, group in groups
        if group
    ]
    lines.append(f"└─ {len(choices)} ranked for {goal.name}: {weights}")
    lines += [
        f"   {place}. {choice.score:.2f} {choice.candidate.name}: "
        + ", ".join(f"{_MARKS[name]} {mark:.2f}" for name, mark in choice.marks.items())
        for place, choice in enumerate(choices, 1)
    ]
    return "\n".join(lines)


def _order(rule: Format | None) -> int:
    return rule.order if rule is not None else 1_000
