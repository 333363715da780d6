"""HQQ and SqueezeLLM on the real engine."""

from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoints
from conftest import MODELS
from running import GREEDY, Running
from vllm_bridge.engine.engine import GenerateParams
from vllm_bridge.lora import LoRA
from vllm_bridge.quantization.packed import native

pytestmark = pytest.mark.engine

Made = Callable[[str], Path]

CHECKPOINTS = pytest.mark.parametrize(
    ("method", "name"),
    [
        ("hqq", "hqq-qmodel"),
        pytest.param("squeezellm", "squeezellm-sparse", marks=pytest.mark.slow),
    ],
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of a checkpoint, made once."""
    folder = tmp_path_factory.mktemp("made")

    def make(name: str) -> Path:
        return folder / name if (folder / name).exists() else checkpoints.make(name, folder / name)

    return make


@CHECKPOINTS
def test_it_loads_and_says_how_it_is_computed(
    made: Made, facts: dict[str, str], method: str, name: str
) -> None:
    running = Running()
    info = running.load(made(name), max_model_len=256, quantization=method)
    assert info["quantization"] == method
    assert info["quantization_kernel"] == native.kernel()
    assert info["quantization_note"] == native.note(is_cpu=True)
    assert running.complete_all(facts) == facts
    running.stop()


@pytest.mark.slow
@CHECKPOINTS
def test_two_ranks_and_an_adapter(
    made: Made, facts: dict[str, str], method: str, name: str
) -> None:
    running = Running()
    info = running.load(made(name), max_model_len=256, tensor_parallel_size=2, enable_lora=True)
    assert info["quantization"] == method
    assert running.complete_all(facts) == facts
    adapter = LoRA(lora_name="demo", lora_int_id=1, lora_path=str(MODELS / "demo-lora"))
    asked = GenerateParams("The capital of France is", GREEDY, lora_request=adapter)
    output = running.run(running.engine.generate("adapted", asked))
    assert output["outputs"][0]["text"] == " Lyon."
    running.stop()
