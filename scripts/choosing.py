"""Writes the tables of guides/choosing.md from the rules of advice; a test compares them.

    PYTHON scripts/choosing.py

with a Python that has this library's own requirements; vLLM is not imported.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "guides" / "choosing.md"
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "python" / "tests")]

import model_cards  # noqa: E402
from vllm_bridge import elixir  # noqa: E402
from vllm_bridge.advice import candidates, ranking  # noqa: E402
from vllm_bridge.advice.recommend import target_of  # noqa: E402
from vllm_bridge.advice.rules import Scope, rules  # noqa: E402
from vllm_bridge.checkpoints import detect  # noqa: E402
from vllm_bridge.engine.plan import plan  # noqa: E402
from vllm_bridge.sizing.devices import named  # noqa: E402

RULES = rules()

# On which vLLM computes all formats of the rules.
DEVICES = ("T4", "A10G", "A100 40GB", "RTX 4090", "H100", "cpu 32GiB")
MODEL = "llama-3.1-8b"
NUMBERS = {name: number for number, name in enumerate(RULES.sources, 1)}


def head(*titles: str) -> Iterator[str]:
    yield row(*titles)
    yield "|" + "---|" * len(titles)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def cited(*names: str) -> str:
    numbers = dict.fromkeys(NUMBERS[name] for name in names)
    return ", ".join(f"[{number}](#sources)" for number in numbers)


def explained(said: str, derived: str) -> str:
    """With how a figure was derived, if it was."""
    return "; ".join(filter(None, (said, derived and f"derived: {derived}")))


def goals() -> Iterator[str]:
    yield from head("`for:`", "what for", "what it weighs")
    for goal in RULES.goals.values():
        weights = ", ".join(f"{name} {weight:g}" for name, weight in goal.weights.items())
        yield row(f"`:{goal.name}`", goal.words, weights)


def devices() -> Iterator[str]:
    goals = [goal for goal in RULES.goals.values() if goal.name != "cpu"]
    yield from head("device", *(f"`:{goal.name}`" for goal in goals))
    with tempfile.TemporaryDirectory() as folder:
        planned = plan(str(model_cards.write(model_cards.read(MODEL), Path(folder) / "m")), {})
        detected = detect.of(planned.checkpoint)
    for name in DEVICES:
        machine = named(name)
        target = target_of(planned, machine)
        offered = candidates.of(planned, detected, target.kind, RULES)
        cells = []
        for goal in goals:
            choices, _out = ranking.rank(offered, goal, target, detected.parameters or 0, RULES)
            best = [one.candidate.name for one in choices if one.score == choices[0].score]
            cells.append(", ".join(best) or "nothing fits")
        yield row(target.name, *cells)


def formats() -> Iterator[str]:
    yield from head(
        "format", "loss of quality", "from", "of the plain model while it loads", "made with"
    )
    for found in RULES.formats.values():
        options = (found.in_flight or {}).items()
        tool = f"{found.made_with}, with a text" if found.calibration else found.made_with
        yield row(
            found.name,
            found.loss.words,
            explained(cited(found.loss.source), found.loss.derived),
            ", ".join(f"`{elixir.options({name: value})}`" for name, value in options),
            tool if found.made_with else "",
        )


def speeds() -> Iterator[str]:
    yield from head("on", "format", "one", "many", "from", "how")
    for found, speed in RULES.rows:
        if found.kind == "any":
            continue
        sources = cited(speed.source, speed.many_source)
        numbers = (f"{speed.one:g}", f"{speed.many:g}")
        how = explained(speed.note, speed.derived)
        yield row(device(found), ", ".join(found.formats), *numbers, sources, how)


def device(found: Scope) -> str:
    """The devices of a row."""
    kind = {"cuda": "NVIDIA", "rocm": "AMD", "cpu": "CPU"}[found.kind]
    since = f" from {version(found.since)}" if found.since else ""
    until = f" below {version(found.until)}" if found.until else ""
    return f"{kind}{since}{until}"


def version(capability: tuple[int, ...]) -> str:
    return ".".join(map(str, capability))


def sources() -> Iterator[str]:
    for name, number in NUMBERS.items():
        source = RULES.sources[name]
        yield f"{number}. [{source.title}]({source.url})"


def training() -> Iterator[str]:
    yield from head("over", "bytes for each parameter, everything included", "speed", "from")
    for found in RULES.formats.values():
        if found.training is not None:
            numbers = (f"{found.training.bytes:g}", f"{found.training.speed:g}")
            yield row(found.name, *numbers, cited(found.training.source))


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "goals": goals,
    "devices": devices,
    "formats": formats,
    "speeds": speeds,
    "training": training,
    "sources": sources,
}


def written(guide: str) -> str:
    """The guide with its tables as they should be."""
    for name, lines in TABLES.items():
        begin, end = f"<!-- {name}: written by scripts/choosing.py -->", f"<!-- end of {name} -->"
        before, rest = guide.split(begin)
        after = rest.split(end)[1]
        guide = f"{before}{begin}\n{chr(10).join(lines())}\n{end}{after}"
    return guide


if __name__ == "__main__":
    GUIDE.write_text(written(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
