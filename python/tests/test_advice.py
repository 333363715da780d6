"""The rules of advice, and the order in which they put the formats of a model."""

import random
import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_bridge.advice import ranking
from vllm_bridge.advice.ranking import Candidate, Choice, Room, RuledOut, Target
from vllm_bridge.advice.rules import rules
from vllm_bridge.memory import GIB
from vllm_bridge.quantization import registry

ROOT = Path(__file__).resolve().parents[2]

PARAMETERS = 8_030_261_248
LINEAR = 6_979_321_856

# Bytes of each weight of a linear layer, or of all weights of a GGUF file.
BYTES = {
    "plain": 2.0,
    "fp8": 1.0,
    "compressed-tensors (W8A8)": 1.0,
    "awq (4 bits)": 0.52,
    "gptq (4 bits)": 0.52,
    "gptq (3 bits)": 0.39,
    "bitsandbytes (4 bits)": 0.56,
    "gguf (Q4_K_M)": 0.6,
    "gguf (Q2_K)": 0.38,
}


def candidate(name: str, refusal: str = "") -> Candidate:
    """A format of a model as large as Llama 3.1 8B."""
    each = BYTES[name]
    if name.startswith("gguf"):
        size = int(PARAMETERS * each)
    else:
        size = int(LINEAR * each + 2 * (PARAMETERS - LINEAR))
    method = None if name == "plain" else name.split(" ")[0]
    return Candidate(name, method, size, size, refusal=refusal)


def target(kind: str, capability: tuple[int, int] | None, gib: float) -> Target:
    return Target("it", kind, capability, Room(int(gib * GIB), 2 * GIB))


H100 = target("cuda", (9, 0), 72)
A100 = target("cuda", (8, 0), 36)
T4 = target("cuda", (7, 5), 13.5)
CPU = target("cpu", None, 32)


def ranked(
    goal: str, on: Target, candidates: Sequence[Candidate] | None = None
) -> tuple[list[Choice], list[RuledOut]]:
    found = [candidate(name) for name in BYTES] if candidates is None else candidates
    return ranking.rank(found, rules().goals[goal], on, PARAMETERS, rules())


def first(goal: str, on: Target) -> str:
    return ranked(goal, on)[0][0].candidate.name


def test_every_figure_has_a_source_and_every_source_a_figure() -> None:
    found = rules()
    named = {row.loss.source for row in found.formats.values()}
    named |= {row.training.source for row in found.formats.values() if row.training}
    named |= {speed.source for _scope, speed in found.rows}
    named |= {speed.many_source for _scope, speed in found.rows}
    assert named == found.sources.keys()


def test_weights_of_each_goal_add_up_to_one() -> None:
    for goal in rules().goals.values():
        assert sum(goal.weights.values()) == pytest.approx(1.0), goal.name


def test_rows_of_speed_are_for_formats_that_the_rules_know() -> None:
    known = set(rules().formats) | {name.partition(" (")[0] for name in rules().formats}
    for scope, _speed in rules().rows:
        assert set(scope.formats) <= known


def test_the_registry_of_methods_and_the_rules_know_each_other() -> None:
    known = rules().formats
    for method in registry.every():
        # Of GGUF's types files are mixed, and the mixes are what the rules are about.
        if method.name != "gguf":
            assert {form.name for form in method.formats} <= set(known), method.name
    online = {method.name for method in registry.every() if method.online is not None}
    dtypes = registry.online_dtypes()
    made = [form.in_flight for form in known.values() if form.in_flight is not None]
    assert {
        dtypes[options["dtype"]].name if "dtype" in options else options["quantization"]
        for options in made
    } == online


@pytest.mark.parametrize(
    ("goal", "on", "best"),
    [
        # One sequence waits for memory: the fewest bytes with a kernel win.
        ("latency", H100, "awq (4 bits)"),
        ("latency", A100, "awq (4 bits)"),
        # Many wait for computing: FP8 where the device has it, else the room for more of them.
        ("throughput", H100, "fp8"),
        ("throughput", A100, "awq (4 bits)"),
        ("quality", H100, "plain"),
        ("quality", T4, "fp8"),
        # Two bits would be less, and of no use; GGUF has no kernels on GPUs.
        ("memory", H100, "awq (4 bits)"),
        ("memory", CPU, "gguf (Q4_K_M)"),
        ("fine_tuning", A100, "plain"),
        ("fine_tuning", target("cuda", (8, 9), 21.6), "bitsandbytes (4 bits)"),
        ("cpu", CPU, "gguf (Q4_K_M)"),
        ("latency", CPU, "gguf (Q4_K_M)"),
    ],
)
def test_what_comes_first(goal: str, on: Target, best: str) -> None:
    assert first(goal, on) == best


def test_the_order_does_not_depend_on_that_of_the_candidates() -> None:
    names = list(BYTES)
    shuffled = random.Random(1)  # noqa: S311
    expected = [choice.candidate.name for choice in ranked("throughput", H100)[0]]
    for _ in range(5):
        shuffled.shuffle(names)
        choices, _out = ranked("throughput", H100, [candidate(name) for name in names])
        assert [choice.candidate.name for choice in choices] == expected
    # AWQ and GPTQ are equal: the rules have AWQ first.
    assert expected.index("awq (4 bits)") + 1 == expected.index("gptq (4 bits)")


def test_the_reasons_say_what_was_derived_and_from_what() -> None:
    reasons = {choice.candidate.name: choice.reasons for choice in ranked("throughput", H100)[0]}
    fp8 = " ".join(reasons["fp8"])
    assert "derived: for one sequence as INT8 weights, which are as many bytes)." in fp8
    # Its loss is quoted.
    assert fp8.count("derived") == 1
    assert rules().formats["compressed-tensors (W4A16)"].loss.derived.startswith("as GPTQ")


def test_what_cannot_run_or_does_not_fit_is_never_recommended() -> None:
    refused = candidate("awq (4 bits)", refusal="vLLM needs capability 7.5 for it.")
    choices, out = ranked("latency", T4, [refused, candidate("plain"), candidate("gptq (4 bits)")])
    assert [choice.candidate.name for choice in choices] == ["gptq (4 bits)"]
    assert [(one.candidate.name, one.why) for one in out] == [
        ("awq (4 bits)", "cannot_run"),
        ("plain", "does_not_fit"),
    ]
    assert out[0].message == "vLLM needs capability 7.5 for it."
    assert out[1].message == "It needs 17.0 GiB in all, and it has 13.5 GiB for it."


def test_adapters_are_trained_over_few_formats() -> None:
    choices, out = ranked("fine_tuning", H100)
    assert [choice.candidate.name for choice in choices] == ["plain", "bitsandbytes (4 bits)"]
    assert {one.why for one in out} == {"not_for_the_goal"}
    # With the gradients and activations of 8 billion parameters, not only their weights.
    assert choices[0].needs == int(3.16 * PARAMETERS)


def test_reasons_name_the_figures_and_where_they_are_from() -> None:
    choice = ranked("latency", A100)[0][0]
    assert choice.reasons[0].startswith("Loss of quality small: accuracy falls by 1.6 % (Hugging")
    assert "2.7 times the speed of 16 bits for one sequence (AIMultiple" in choice.reasons[1]
    assert "1.6 times for many (Jarvis Labs" in choice.reasons[1]


def test_a_format_without_rules_is_ranked_and_said_to_be_unknown() -> None:
    unknown = Candidate("new (5 bits)", "new", 5 * GIB, 5 * GIB)
    choices, _out = ranked("latency", A100, [unknown, candidate("plain")])
    found = next(choice for choice in choices if choice.candidate.name == "new (5 bits)")
    assert found.speed is None
    assert "not known" in found.reasons[0]
    assert "not known" in found.reasons[1]


def test_the_picture_shows_how_it_was_decided() -> None:
    refused = candidate("awq (4 bits)", refusal="No.")
    choices, out = ranked("memory", T4, [refused, candidate("plain"), candidate("gptq (4 bits)")])
    assert ranking.picture("org/m", rules().goals["memory"], T4, choices, out) == (
        "org/m on it: 3 formats\n"
        "├─ 1 cannot run there: awq (4 bits)\n"
        "├─ 1 too large: plain\n"
        "└─ 1 ranked for memory: 55% little memory, 35% quality, 10% the speed of one sequence\n"
        "   1. 0.95 gptq (4 bits): little memory 1.00, quality 0.85, the speed of one sequence 1.00"
    )


def test_the_tables_of_the_guide_are_those_of_the_rules() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "choosing.py"))
    guide = script["GUIDE"].read_text(encoding="utf-8")
    assert script["written"](guide) == guide, "run scripts/choosing.py"
