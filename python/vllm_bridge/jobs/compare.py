"""What models lose against a reference: rows of a table, from what ``measure`` has written."""

import asyncio
import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import usual
from vllm_bridge.jobs.measure import finite
from vllm_bridge.rpc.call import Call
from vllm_bridge.rpc.table import NoParams

if TYPE_CHECKING:
    from vllm_bridge.jobs.distributions import Distributions, Divergence

# By how much the weights of two models may differ in number, so that one is taken to be made of the
# other: tied output layers count once or twice.
_ALIKE = 0.5

# How much, in nats, what comes before a place must tell the reference, so that it can be seen
# whether another model still heeds it.
_TOLD = 0.1

# Of fewer places that cannot be seen: what is expected on average over n places has a share of 1/n
# of what is expected at each, so that not heeding the text costs ln n at most, and few bits may
# cost as much.
_PLACES = 256


class CompareParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``compare``: files that ``measure`` has written."""

    reference: str
    others: list[str]


async def workspace(_call: Call, _params: NoParams) -> dict[str, str]:
    """A folder for measurements, which goes when this worker ends, however it does."""
    return {"path": tempfile.mkdtemp()}


async def compare(_call: Call, params: CompareParams) -> list[dict[str, Any]]:
    """A row for each of ``others``, in their order."""
    return await asyncio.to_thread(rows, params.reference, params.others)


def rows(reference: str, others: Sequence[str]) -> list[dict[str, Any]]:
    """What ``compare`` answers.

    Raises:
        BridgeError: ``invalid_option`` for a file that ``measure`` has not written
    """
    ours = _read(reference)
    return [row(ours, _read(path)) for path in others]


def _read(path: str) -> "Distributions":
    from safetensors import SafetensorError

    from vllm_bridge.jobs.distributions import Distributions

    try:
        return Distributions.load(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BridgeError(
            "invalid_option",
            f"`{path}` is no measurement: {error}",
            {"file": path},
            remedy="Measure the model again.",
        ) from error


def row(reference: "Distributions", other: "Distributions") -> dict[str, Any]:
    """What is told of one model."""
    from vllm_bridge.jobs import distributions

    figures = other.figures
    made: dict[str, Any] = dict.fromkeys(
        ("kl_mean", "kl_error", "kl_p99", "same_top", "rest", "same_answers", "usual", "verdict")
    )
    said = []
    if (why := _differ(reference, other)) is not None:
        said.append(why)
    else:
        found = distributions.divergence(reference, other)
        verdict, sentences = _verdict(found, reference, figures)
        said += sentences
        known = usual.of(figures)
        made |= {
            "kl_mean": finite(found.mean),
            "kl_error": finite(found.error),
            "kl_p99": finite(found.p99),
            "same_top": found.same_top,
            "rest": found.rest,
            "same_answers": _same(reference.figures["answer_ids"], figures["answer_ids"]),
            "usual": known and known.kl,
            "verdict": verdict,
        }
    wire = {name: value for name, value in figures.items() if name != "answer_ids"}
    return wire | made | {"says": said}


def _differ(reference: "Distributions", other: "Distributions") -> str | None:
    """Why two models cannot be compared token by token; None where they can."""
    import numpy as np

    if np.array_equal(reference.tokens, other.tokens) and np.array_equal(
        reference.lengths, other.lengths
    ):
        return None
    return (
        f"It cuts the text into other tokens than `{reference.figures['model']}`, so that their "
        "probabilities and perplexities are of different things. Compare the bits per byte."
    )


def _verdict(
    found: "Divergence", reference: "Distributions", figures: Mapping[str, Any]
) -> tuple[str | None, list[str]]:
    """``"ok"``, ``"worse_than_usual"``, ``"broken"`` or None where there is nothing usual; and what
    there is to say."""
    said = []
    if found.rest > 0:
        said.append(
            f"Probabilities of {found.rest:.2%} on average are of tokens that not both have among "
            "their likeliest; how they differ within those is not counted."
        )
    if figures["format"] == "plain" or figures["model"] == reference.figures["model"]:
        return None, said
    counts = [one["parameters"] or 0 for one in (reference.figures, figures)]
    if min(counts) < _ALIKE * max(counts):
        return None, [*said, "It is no model of the same size, so that there is nothing usual."]
    known = usual.of(figures)
    if known is not None and found.mean <= known.limit:
        return "ok", said
    if (why := _broken(found, reference)) is not None:
        return "broken", [*said, why, "Make it again in another format, or with other options."]
    if known is None:
        return None, said
    of_small = " of a small model" if known.is_small else ""
    said.append(
        f"Its mean KL divergence of {found.mean:.4f} is worse than usual: {known.of} was measured "
        f"to have {known.kl:.4f} ({known.source}), and up to {known.limit:.4f} is usual{of_small}."
    )
    said.append(usual.instead(figures))
    return "worse_than_usual", said


def _broken(found: "Divergence", reference: "Distributions") -> str | None:
    """Why a model that lost more than is usual is no quantization of the reference; None where it
    can be one."""
    from vllm_bridge.jobs import distributions

    if not math.isfinite(found.mean):
        return "It gives probabilities that are no numbers, or none to what the other expects."
    if len(reference.chosen) < _PLACES:
        return None
    context = distributions.context(reference)
    if context > _TOLD and found.mean >= context:
        return (
            f"Its mean KL divergence of {found.mean:.4f} is that of another model: one that does "
            f"not heed what comes before has {context:.4f}."
        )
    return None


def _same(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float | None:
    """The share of the tokens of greedy answers before the first one that differs."""
    counts = [
        next((at for at, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    ]
    total = sum(map(len, ours))
    return sum(counts) / total if total else None


METHODS: dict[str, Any] = {
    "compare": (CompareParams, compare),
    "workspace": (NoParams, workspace),
}
