"""Which formats run on a device, asked of the installed vLLM."""

from collections.abc import Sequence

import pytest

from vllm_bridge.advice import running
from vllm_bridge.advice.ranking import Candidate
from vllm_bridge.advice.rules import rules
from vllm_bridge.sizing import devices

pytestmark = pytest.mark.slow  # imports vLLM

FORMATS = {
    "plain": None,
    "awq (4 bits)": "awq",
    "gptq (4 bits)": "gptq",
    "compressed-tensors (W8A8)": "compressed-tensors",
    "fp8": "fp8",
    "hqq (4 bits)": "hqq",
    "torchao (8 bits)": "torchao",
    "gguf (Q4_K_M)": "gguf",
    "new": "a-method-that-nobody-knows",
}


def refused(device: str | None) -> dict[str, str]:
    """Why formats do not run, of those that do not."""
    found: Sequence[devices.Device] = devices.here() if device is None else devices.named(device)
    asked = [Candidate(name, method, 1, 1) for name, method in FORMATS.items()]
    answers = running.refused(asked, found, device is None, rules())
    return {one.name: one.refusal for one in answers if one.refusal}


def test_a_device_must_be_new_enough_for_a_method() -> None:
    assert refused("H100") == {}
    old = refused("V100")
    assert old.keys() == {"awq (4 bits)", "compressed-tensors (W8A8)", "fp8", "torchao (8 bits)"}
    assert old["awq (4 bits)"] == (
        "vLLM has it for compute capability 7.5 and more, and V100 16GB has 7.0."
    )


def test_a_device_may_be_too_new() -> None:
    assert list(refused("RTX 5090")) == ["compressed-tensors (W8A8)"]
    assert "FP8 takes its place" in refused("RTX 5090")["compressed-tensors (W8A8)"]


def test_several_devices_run_what_all_of_them_do() -> None:
    assert "fp8" not in refused("H100")
    found: Sequence[devices.Device] = devices.named(["H100", "V100"])
    asked = [Candidate("fp8", "fp8", 1, 1)]
    assert running.refused(asked, found, False, rules())[0].refusal.endswith("V100 16GB has 7.0.")


def test_vllm_tries_each_format_on_this_machine() -> None:
    # The extras are installed where the tests run.
    assert refused(None) == {}
