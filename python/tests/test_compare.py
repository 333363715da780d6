"""What models lose, on distributions whose figures were worked out by hand."""

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import compare, measure, usual
from vllm_bridge.jobs.distributions import (
    Distributions,
    bits_per_byte,
    context,
    divergence,
    perplexity,
)

FIGURES: dict[str, Any] = {
    "model": "org/model",
    "format": "plain",
    "bits": None,
    "activation_bits": None,
    "parameters": 8_000_000_000,
    "answer_ids": [[1, 2, 3, 4], [5, 6, 7, 8]],
    "perplexity": 2.0,
}
AWQ: dict[str, Any] = {"model": "org/model-awq", "format": "awq (4 bits)", "bits": 4}


def distributions(
    rows: list[dict[int, float]],
    vocabulary: int,
    tokens: list[int] | None = None,
    **figures: Any,
) -> Distributions:
    """Of one window, from the probabilities of tokens at each place; the first token follows."""
    ordered = [sorted(row.items(), key=lambda item: -item[1]) for row in rows]
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array([[p for _, p in row] for row in ordered]))
        chosen = np.log(np.array([row.get(1, 1e-9) for row in rows]))
    return Distributions(
        tokens=np.array(tokens or [0, *[1] * len(rows)], np.uint32),
        lengths=np.array([len(rows) + 1], np.uint32),
        chosen=chosen.astype(np.float32),
        ids=np.array([[id for id, _ in row] for row in ordered], np.uint32),
        logprobs=logprobs.astype(np.float32),
        vocabulary=vocabulary,
        figures=FIGURES | figures,
    )


EVEN = {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}
UNEVEN = {1: 0.5, 0: 0.25, 2: 0.125, 3: 0.125}


def test_a_model_is_nothing_apart_from_itself() -> None:
    model = distributions([EVEN, UNEVEN], 4)
    found = divergence(model, model)
    assert (found.mean, found.error, found.p99, found.rest) == (0.0, 0.0, 0.0, 0.0)
    assert found.same_top == 1.0


def test_the_divergence_is_that_of_the_reference_from_the_other() -> None:
    even, uneven = distributions([EVEN], 4), distributions([UNEVEN], 4)
    # 1/4 ln(1/2) + 1/4 ln 1 + 2 · 1/4 ln 2, and the other way round 1/2 ln 2 + 2 · 1/8 ln(1/2)
    assert divergence(even, uneven).mean == pytest.approx(math.log(2) / 4, abs=1e-6)
    assert divergence(uneven, even).mean == pytest.approx(math.log(2) / 4, abs=1e-6)
    skewed = distributions([{0: 0.7, 1: 0.1, 2: 0.1, 3: 0.1}], 4)
    assert divergence(even, skewed).mean == pytest.approx(
        0.25 * math.log(0.25 / 0.7) + 0.75 * math.log(2.5), abs=1e-6
    )
    assert divergence(skewed, even).mean == pytest.approx(
        0.7 * math.log(2.8) + 0.3 * math.log(0.4), abs=1e-6
    )


def test_mean_error_percentile_and_same_top_are_over_the_places() -> None:
    # A quarter of ln 2 at one place of four, and there another token at the top.
    top = {0: 0.5, 1: 0.25, 2: 0.125, 3: 0.125}
    other = {1: 0.5, 0: 0.25, 2: 0.125, 3: 0.125}
    found = divergence(
        distributions([top, top, top, top], 4), distributions([top, top, top, other], 4)
    )
    one = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.mean == pytest.approx(one / 4, abs=1e-6)
    # The standard deviation of (0, 0, 0, one) is one half of it, and the root of four is two.
    assert found.error == pytest.approx(one / 4, abs=1e-6)
    assert found.p99 == pytest.approx(0.97 * one, abs=1e-6)
    assert found.same_top == 0.75


def test_of_large_vocabularies_tokens_that_not_both_kept_are_one() -> None:
    # Each keeps two of a hundred tokens: token 1 is the one that both have.
    reference = distributions([{1: 0.6, 2: 0.3}], 100)
    other = distributions([{1: 0.5, 3: 0.2}], 100)
    found = divergence(reference, other)
    assert found.rest == pytest.approx(0.4, abs=1e-6)
    lumped = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    assert found.mean == pytest.approx(lumped, abs=1e-6)


def test_what_is_told_of_a_part_is_never_more_than_of_the_whole() -> None:
    random = np.random.default_rng(0)
    p, q = (random.dirichlet(np.full(50, 0.3), 64) for _ in range(2))
    whole = [distributions([dict(enumerate(row)) for row in rows.tolist()], 50) for rows in (p, q)]
    parts = [
        Distributions(
            one.tokens, one.lengths, one.chosen, one.ids[:, :20], one.logprobs[:, :20], 50, FIGURES
        )
        for one in whole
    ]
    expected = float((p * np.log(p / q)).sum(1).mean())
    assert divergence(*whole).mean == pytest.approx(expected, rel=1e-4)
    of_part = divergence(*parts)
    assert 0 < of_part.mean < expected
    lists = [part.ids.tolist() for part in parts]
    both = [set(one) & set(two) for one, two in zip(*lists, strict=True)]
    kept = [p[row, list(tokens)].sum() for row, tokens in enumerate(both)]
    assert of_part.rest == pytest.approx(1 - np.mean(kept), abs=1e-5)


def test_perplexity_and_bits_per_byte() -> None:
    model = distributions([{1: 0.5, 0: 0.5}, {1: 0.125, 0: 0.875}], 2)
    assert perplexity(model) == pytest.approx(4.0, rel=1e-6)  # the root of 2 · 8
    assert bits_per_byte(model, 8) == pytest.approx(0.5, rel=1e-6)  # 1 + 3 bits for 8 bytes


def test_a_measurement_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = str(tmp_path / "measured")
    model = distributions([EVEN, UNEVEN], 4)
    model.save(path)
    (row,) = asyncio.run(
        compare.compare(None, compare.CompareParams(path, [path]))  # type: ignore[arg-type]
    )
    assert row["kl_mean"] == 0.0
    assert row["same_answers"] == 1.0
    assert row["perplexity"] == 2.0
    assert "answer_ids" not in row
    assert (row["verdict"], row["says"]) == (None, [])


def test_what_is_no_measurement_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("no measurement")
    for file in (path, tmp_path / "nothing"):
        with pytest.raises(BridgeError, match="is no measurement") as caught:
            compare.rows(str(file), [])
        assert caught.value.reason == "invalid_option"


def test_models_that_cut_the_text_otherwise_are_compared_by_bytes_alone() -> None:
    other = distributions([EVEN], 4, tokens=[0, 2], **AWQ)
    row = compare.row(distributions([EVEN], 4), other)
    assert (row["kl_mean"], row["same_top"], row["verdict"]) == (None, None, None)
    assert row["says"] == [
        "It cuts the text into other tokens than `org/model`, so that their probabilities and "
        "perplexities are of different things. Compare the bits per byte."
    ]


def test_answers_are_the_same_up_to_the_first_token_that_differs() -> None:
    other = distributions([EVEN], 4, answer_ids=[[1, 2, 0, 4], [5, 6, 7, 8]])
    assert compare.row(distributions([EVEN], 4), other)["same_answers"] == 0.75


def test_a_quantization_that_loses_more_than_usual_is_told_with_what_to_try() -> None:
    reference = distributions([EVEN], 4)
    good = compare.row(reference, distributions([EVEN], 4, **AWQ))
    assert (good["verdict"], good["usual"], good["says"]) == ("ok", 0.07194, [])
    broken = distributions([{0: 0.97, 1: 0.01, 2: 0.01, 3: 0.01}], 4, **AWQ)
    row = compare.row(reference, broken)
    assert row["verdict"] == "worse_than_usual"
    why, instead = row["says"]
    assert "2.0752 is worse than usual: Q4_0 was measured to have 0.0719" in why
    assert "up to 0.2158 is usual" in why
    assert instead.startswith("Take a smaller `group_size`")


# What is expected at each of 256 places, of four tokens.
SURE = [{token: 0.97} | dict.fromkeys({0, 1, 2, 3} - {token}, 0.01) for token in range(4)] * 64
ONE_BIT: dict[str, Any] = {**AWQ, "format": "hqq (1 bit)", "bits": 1}


def test_what_does_not_heed_what_comes_before_is_broken() -> None:
    reference = distributions(SURE, 4)
    # -ln 1/4, and what the reference is unsure of: 0.97 ln 0.97 + 3 · 0.01 ln 0.01
    assert context(reference) == pytest.approx(1.3863 - 0.0295 - 0.1382, abs=1e-4)
    unheeding = compare.row(reference, distributions([EVEN] * 256, 4, **AWQ))
    assert unheeding["verdict"] == "broken"
    assert "one that does not heed what comes before has 1.2186" in unheeding["says"][0]
    other = distributions([*SURE[1:], SURE[0]], 4, **ONE_BIT)
    assert compare.row(reference, other)["verdict"] == "broken"
    half = [{token: 0.5 * p + 0.125 for token, p in row.items()} for row in SURE]
    assert compare.row(reference, distributions(half, 4, **ONE_BIT))["verdict"] is None
    assert compare.row(reference, distributions(half, 4, **AWQ))["verdict"] == "worse_than_usual"


def test_of_few_places_it_cannot_be_seen_whether_a_model_heeds_what_comes_before() -> None:
    few = distributions(SURE[:255], 4)
    assert compare.row(few, distributions([EVEN] * 255, 4, **ONE_BIT))["verdict"] is None
    row = compare.row(few, distributions([EVEN] * 255, 4, **AWQ))
    assert row["verdict"] == "worse_than_usual"


def test_what_loses_no_more_than_its_format_does_is_not_broken() -> None:
    small: dict[str, Any] = {"parameters": 500_000_000}
    reference = distributions(SURE, 4, **small)
    # Up to 11.5 is usual of it, and 1.2186 is what does not heed what comes before.
    of_few_bits = {**AWQ, **small, "format": "gguf (IQ1_S)", "bits": 1.6}
    assert compare.row(reference, distributions([EVEN] * 256, 4, **of_few_bits))["verdict"] == "ok"


def test_of_large_vocabularies_the_context_is_that_of_what_was_kept() -> None:
    # Two tokens of a hundred at each place, with 0.1 for all others together.
    reference = distributions([{1: 0.6, 2: 0.3}, {3: 0.6, 4: 0.3}], 100)
    # Of the mean the other place has 0.45, so that what is not kept has 0.55.
    expected = 0.9 * math.log(2) + 0.1 * math.log(0.1 / 0.55)
    assert context(reference) == pytest.approx(expected, abs=1e-6)


def test_probabilities_that_are_no_numbers_are_broken() -> None:
    nothing = dict.fromkeys(range(4), math.nan)
    row = compare.row(distributions([EVEN], 4), distributions([nothing], 4, **AWQ))
    assert (row["verdict"], row["kl_mean"]) == ("broken", None)
    never = {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}
    row = compare.row(distributions([EVEN], 4), distributions([never], 4, **AWQ))
    assert (row["verdict"], row["kl_mean"]) == ("broken", None)


def test_there_is_nothing_usual_between_other_models() -> None:
    far = {0: 0.97, 1: 0.01, 2: 0.01, 3: 0.01}
    reference = distributions([EVEN], 4)
    plain = compare.row(reference, distributions([far], 4, model="org/other"))
    assert (plain["verdict"], plain["says"]) == (None, [])
    small = distributions([far], 4, **AWQ, parameters=1_000_000_000)
    row = compare.row(reference, small)
    assert row["verdict"] is None
    assert row["says"] == ["It is no model of the same size, so that there is nothing usual."]


@pytest.mark.parametrize(
    ("format", "bits", "activation_bits", "kl", "of"),
    [
        ("gguf (Q4_K_M)", 4.8, None, 0.031273, "Q4_K_M"),
        ("gguf (F16)", None, None, 0.000551, "F16"),
        ("gguf (Q4_K_XL)", 4.9, None, 0.07194, "Q4_0"),  # a mix that the table does not know
        ("gptq (2 bits)", 2, None, 0.445132, "Q2_K"),
        ("hqq (3 bits)", 3, None, 0.228217, "Q3_K_S"),
        ("bitsandbytes (8 bits)", 8, None, 0.001355, "Q8_0"),
        ("compressed-tensors (W8A8)", 8, 8, 0.02, "FP8 weights and activations"),
        ("fp8", 8, None, 0.02, "FP8 weights and activations"),
    ],
)
def test_what_is_usual_is_by_type_or_by_bits(
    format: str, bits: float | None, activation_bits: int | None, kl: float, of: str
) -> None:
    said = {"format": format, "bits": bits, "activation_bits": activation_bits}
    found = usual.of({**FIGURES, **said})
    assert found is not None
    assert (found.kl, found.of, found.is_small) == (kl, of, False)
    assert found.limit == pytest.approx(3 * kl)
    small = usual.of({**FIGURES, **said, "parameters": 4_000_000})
    assert small is not None
    assert small.is_small
    assert small.limit > found.limit


@pytest.mark.parametrize(("format", "bits"), [("plain", None), ("gptq (1 bits)", 1), ("new", None)])
def test_of_what_is_not_known_nothing_is_usual(format: str, bits: int | None) -> None:
    assert usual.of({**FIGURES, "format": format, "bits": bits}) is None


def test_the_text_that_ships_has_passages_of_many_kinds() -> None:
    texts = measure.held_out()
    assert len(texts) == 18
    assert all(text == text.strip("\n") and text for text in texts)
    assert texts[2].startswith("def moving_average")


class Letters:
    """A tokenizer of one token for each letter, with one before each text."""

    bos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [0] * add_special_tokens + [ord(letter) for letter in text]


class Bare(Letters):
    bos_token_id = None  # type: ignore[assignment]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return super().encode(text, False)


def cut(tokenizer: Any, texts: list[str], size: int, max_tokens: int) -> measure._Asked:
    asked = measure._Asked(texts, size, max_tokens, lambda *_: None)
    asked.cut(tokenizer)
    return asked


def test_texts_are_cut_into_windows_that_begin_as_texts_do() -> None:
    asked = cut(Letters(), ["abcdé", "xy"], 4, 100)
    a, x = ord("a"), ord("x")
    assert asked.windows == [[0, a, a + 1, a + 2], [0, a + 3, ord("é")], [0, x, x + 1]]
    assert asked.bytes == pytest.approx(8)
    asked = cut(Letters(), ["abcd", "xy"], 4, 4)
    assert asked.windows == [[0, a, a + 1, a + 2], [0, a + 3]]
    assert asked.bytes == pytest.approx(4)


def test_without_such_a_token_the_first_of_a_window_is_not_expected() -> None:
    asked = cut(Bare(), ["abcde"], 4, 100)
    assert [len(window) for window in asked.windows] == [4]
    assert asked.bytes == pytest.approx(3)


def test_texts_without_two_tokens_are_refused() -> None:
    with pytest.raises(BridgeError, match="no two tokens") as caught:
        cut(Bare(), ["a", ""], 4, 100)
    assert caught.value.details == {"option": "texts"}
