"""What a check says. That it says what a start does is seen to wherever a test meets a refusal; see
``refusals``."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import loading
from conftest import MODELS
from vllm_bridge.engine import facts
from vllm_bridge.engine.check import check
from vllm_bridge.engine.finding import Finding
from vllm_bridge.errors import BridgeError

DEMO = str(MODELS / "demo")


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with loading.environment():
        yield


def test_a_model_that_runs() -> None:
    phases: list[str] = []
    options = {"max_model_len": 512, "max_num_seqs": 3}
    checked = check(str(MODELS / "demo-awq"), options, phases.append)
    assert phases == ["import", "config"]
    (told,) = checked.findings
    assert (told.severity, told.reason, told.details["family"]) == ("info", "family", "text")
    assert checked.configured().kernel == loading.INTEGERS
    report = facts.report(checked)
    found = {name: report[name] for name in ("ok", "family", "method", "kernel", "dtype")}
    assert found == {
        "ok": True,
        "family": "text",
        "method": "awq",
        "kernel": loading.INTEGERS,
        "dtype": "bfloat16",
    }
    assert (report["architecture"], report["runner"]) == ("LlamaForCausalLM", "generate")
    assert (report["max_model_len"], report["max_num_seqs"]) == (512, 3)


def test_vllm_is_not_asked_where_there_is_an_error_already(tmp_path: Path) -> None:
    phases: list[str] = []
    checked = check(str(tmp_path), {"temprature": 1}, phases.append)
    assert phases == []
    report = facts.report(checked)
    assert not report["ok"]
    assert [found["reason"] for found in report["findings"]] == ["invalid_option", "not_a_model"]
    assert (report["method"], report["kernel"], report["architecture"]) == (None, None, None)
    with pytest.raises(BridgeError) as caught:
        checked.configured()
    assert caught.value.reason == "invalid_option"


def test_devices_are_those_of_the_engine() -> None:
    from vllm.platforms import current_platform

    assert check(DEMO, {}, devices=["0"]).config is not None
    assert os.environ[current_platform.device_control_env_var] == "0"


def test_what_a_finding_says_has_no_secrets_and_its_remedy_by_itself() -> None:
    finding = Finding("error", "internal", "Of hf_abcDEF123456789.", {"at": 1}, "Look.")
    checked = check(DEMO, {"temprature": 1})._replace(findings=(finding,))
    (found,) = facts.report(checked)["findings"]
    assert found == {
        "severity": "error",
        "reason": "internal",
        "message": "Of [redacted].",
        "remedy": "Look.",
        "details": {"at": 1},
    }
