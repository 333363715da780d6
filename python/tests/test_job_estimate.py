"""What jobs are foreseen to take, against what they took with the demo model."""

from pathlib import Path
from typing import Any

import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import estimate

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "priv" / "models" / "demo")

# The bytes of outputs that producers made of the demo model.
MADE: list[tuple[str, dict[str, Any], int]] = [
    ("gguf", {"ftype": "F16"}, 8172352),
    ("gguf", {"ftype": "Q4_K_M"}, 2483520),
    ("gguf", {"ftype": "Q2_K"}, 1647936),
    ("gguf", {"ftype": "Q8_0"}, 4363072),
    ("gptq", {"bits": 4, "group_size": 128}, 3023216),
    ("gptq", {"bits": 2, "group_size": 32, "sym": False}, 2318204),
    ("gptq", {"bits": 8, "group_size": -1}, 4760448),
    ("awq", {"bits": 4, "group_size": 64}, 3038746),
    ("compressed-tensors", {"scheme": "W4A16", "ignore": ["lm_head"]}, 2955354),
    ("compressed-tensors", {"scheme": "W4A16_ASYM", "group_size": 64}, 3043062),
    ("compressed-tensors", {"scheme": "W8A8", "ignore": ["lm_head", "re:.*down_proj"]}, 5472351),
    ("compressed-tensors", {"scheme": "FP8_DYNAMIC"}, 4689627),
    ("compressed-tensors", {"scheme": "FP8_BLOCK"}, 4665442),
]


@pytest.mark.parametrize(("form", "options", "size"), MADE)
def test_files_are_as_large_as_foreseen(form: str, options: dict[str, Any], size: int) -> None:
    (seen,) = estimate.outputs(DEMO, {}, [(form, options)], 1379)
    assert seen.bytes == pytest.approx(size, rel=0.02)


def test_a_gguf_file_is_made_of_one_in_16_bits_and_that_takes_room_too() -> None:
    (seen,) = estimate.outputs(DEMO, {}, [("gguf", {"ftype": "Q4_K_M"})], 0)
    assert seen.disk - seen.bytes == pytest.approx(8.1e6, rel=0.02)
    (plain,) = estimate.outputs(DEMO, {}, [("gguf", {"ftype": "F16"})], 0)
    assert plain.disk == plain.bytes


def test_outputs_are_made_one_after_the_other() -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("gguf", {"ftype": "Q4_K_M"}),
        ("awq", {"bits": 4, "group_size": 128}),
    ]
    one, other = estimate.outputs(DEMO, {}, asked, 1379)
    both = estimate.together([one, other])
    assert both.bytes == one.bytes + other.bytes
    assert both.disk == both.bytes + one.disk - one.bytes
    assert both.memory == max(one.memory, other.memory)
    assert both.minutes[0] == one.minutes[0] + other.minutes[0]


def test_what_is_quantized_already_is_refused() -> None:
    quantized = str(ROOT / "test" / "checkpoints" / "gptq-w3")
    with pytest.raises(BridgeError) as caught:
        estimate.outputs(quantized, {}, [("awq", {})], 0)
    assert caught.value.reason == "unsupported"
