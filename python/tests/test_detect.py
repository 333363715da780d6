"""How models are quantized, without their weights."""

from checkpoints import MODELS
from vllm_bridge.checkpoints.detect import detect


def test_the_demo_models_are_what_they_are() -> None:
    assert detect(f"{MODELS}/demo", {}).method is None
    assert detect(f"{MODELS}/demo-awq", {}).method == "awq"
    assert detect(f"{MODELS}/demo-gptq", {}).method == "gptq"
