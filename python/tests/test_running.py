"""Which formats run on a device, asked of the installed vLLM."""

from pathlib import Path

import pytest

import model_cards
from vllm_bridge import memory
from vllm_bridge.advice import running
from vllm_bridge.advice.ranking import Candidate
from vllm_bridge.advice.recommend import recommend
from vllm_bridge.engine.check import check
from vllm_bridge.memory import GIB
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
}


def refused(device: str | list[str] | None) -> dict[str, str]:
    """Why formats do not run, of those that do not."""
    machine = devices.here() if device is None else devices.named(device)
    asked = [Candidate(name, method, 1, 1) for name, method in FORMATS.items()]
    answers = running.refused(asked, machine, device is None)
    return {one.name: one.refusal for one in answers if one.refusal}


def test_a_device_must_be_new_enough_for_a_format() -> None:
    assert refused("H100") == {}
    old = refused("V100")
    assert old.keys() == {"awq (4 bits)", "compressed-tensors (W8A8)", "fp8", "torchao (8 bits)"}
    assert old["awq (4 bits)"] == (
        "awq (4 bits) needs a GPU of compute capability 7.5; V100 16GB has 7.0."
    )
    # The method has it, its scheme for INT8 does not.
    assert "7.5" in old["compressed-tensors (W8A8)"]


def test_a_device_may_be_too_new() -> None:
    (form, why), *others = refused("RTX 5090").items()
    assert (form, others) == ("compressed-tensors (W8A8)", [])
    assert (
        why
        == f"vLLM has no kernel for {form} from compute capability 10.0 on; RTX 5090 32GB has 12.0."
    )


def test_platforms_have_lists_of_methods() -> None:
    found = refused("MI300X")
    assert found.keys() == {"hqq (4 bits)", "gguf (Q4_K_M)"}
    assert found["hqq (4 bits)"] == "vLLM does not run hqq on MI300X 192GB (rocm)."


def test_a_method_must_be_one_of_vllms() -> None:
    asked = [Candidate("new (5 bits)", "new", 1, 1)]
    for is_here in (True, False):
        (answer,) = running.refused(asked, devices.named("H100"), is_here)
        assert answer.refusal == "The installed vLLM has no quantization method `new`."


def test_what_a_device_must_be_counts_on_this_machine_too() -> None:
    asked = [Candidate("awq (4 bits)", "awq", 1, 1)]
    (answer,) = running.refused(asked, devices.named("V100"), is_here=True)
    assert answer.refusal == (
        "awq (4 bits) needs a GPU of compute capability 7.5; V100 16GB has 7.0."
    )


def test_several_devices_run_what_all_of_them_do() -> None:
    assert refused(["H100", "V100"]).keys() == refused("V100").keys()


def test_vllm_tries_each_format_on_this_machine() -> None:
    # The extras are installed where the tests run.
    assert refused(None) == {}


@pytest.mark.parametrize("device", ["V100", "T4", "H100", "RTX 5090", "MI300X"])
@pytest.mark.parametrize("card", ["llama-2-7b-awq", "llama-3.1-8b-fp8-dynamic", "mistral-7b-q8-0"])
def test_what_check_refuses_is_not_recommended_and_nothing_else(
    card: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_cpu", lambda: 4096 * GIB)
    model = str(model_cards.write(model_cards.read(card), tmp_path / "model"))
    machine = devices.named(device)
    options = {"skip_tokenizer_init": True, "max_model_len": 1024}
    findings = check(model, options, machine=machine).findings
    errors = [finding.message for finding in findings if finding.severity == "error"]
    advice = recommend(model, options, None, machine)
    assert [one["message"] for one in advice["ruled_out"]] == errors
    assert len(advice["choices"]) == 1 - len(errors)
