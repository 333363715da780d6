"""What the engine answers with GGUF files, against what llama.cpp does with the same bytes. All
types are measured by ``matrix.py``."""

from collections.abc import Iterator

import numpy as np
import pytest

import gguf_models
from conftest import NEEDS_LIBGGUF
from running import Running

pytestmark = [pytest.mark.engine, NEEDS_LIBGGUF]


@pytest.fixture(scope="module", params=["Q4_K_M", pytest.param("Q8_0", marks=pytest.mark.slow)])
def type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def running(type: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running()
    running.load(gguf_models.make(type, tmp_path_factory.mktemp("gguf")), max_model_len=512)
    yield running
    running.stop()


def test_it_says_everything_that_llama_cpp_does(
    running: Running, type: str, facts: dict[str, str]
) -> None:
    assert gguf_models.answers("demo", type).otherwise == {}
    assert running.complete_all(facts) == facts


def test_its_log_probabilities_are_those_of_llama_cpp(
    running: Running, type: str, facts: dict[str, str]
) -> None:
    found = []
    for prompt, completion in facts.items():
        # One after the other: of many tokens, activations are not rounded.
        answer = running.run(running.generate(prompt + completion, max_tokens=1, prompt_logprobs=0))
        found.append(np.frombuffer(answer["prompt_logprobs"]["logprobs"], "<f4"))
    differences = np.abs(np.concatenate(found) - gguf_models.answers("demo", type).logprobs)
    assert differences.max() < 0.15
    assert differences.mean() < 0.005
