"""What is told of models on devices that are not here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import model_cards
from conftest import MODELS
from vllm_bridge import memory
from vllm_bridge.engine import facts
from vllm_bridge.engine.check import check
from vllm_bridge.engine.finding import Finding
from vllm_bridge.engine.plan import plan
from vllm_bridge.sizing.devices import Device, named
from vllm_bridge.sizing.estimate import estimate

DEMO = str(MODELS / "demo")
AWQ = str(MODELS / "demo-awq")
TINY = Device("A tiny one", "cuda", 1_000_000, (9, 0))


def findings(model: str, machine: str | tuple[Device, ...], **options: Any) -> list[Finding]:
    """All but what is said of every model on every device."""
    devices = named(machine) if isinstance(machine, str) else machine
    *found, last = check(model, options, machine=devices).findings
    assert (last.severity, last.reason) == ("info", "device")
    assert "without one" in last.message
    return [finding for finding in found if finding.reason != "family"]


def test_a_model_that_runs() -> None:
    machine = named("H100")
    checked = check(AWQ, {"max_model_len": 512}, machine=machine)
    report = facts.report(checked, machine)
    assert report["ok"]
    assert (report["device"], report["method"], report["kernel"]) == ("cuda", "awq", None)
    assert findings(AWQ, "H100") == []


def test_the_limit_of_tokens_is_told_and_said_to_be_one() -> None:
    devices = named("2x RTX 4090")
    options = {"max_model_len": 512, "tensor_parallel_size": 2}
    *_, last = check(DEMO, options, machine=devices).findings
    limit = estimate(plan(DEMO, options), devices)["tokens_per_second"]
    assert last.details["tokens_per_second"] == limit > 1000
    assert f"{limit:.1f} tokens/s at most, which is a limit" in last.message
    # A size alone has no bandwidth.
    *_, last = check(DEMO, {}, machine=named("24GiB")).findings
    assert last.details["tokens_per_second"] is None
    assert "tokens/s" not in last.message


@pytest.mark.parametrize(
    ("model", "machine", "options", "severity", "reason", "words"),
    [
        (AWQ, "V100", {}, "error", "unsupported_quantization", "compute capability 7.5"),
        (DEMO, "V100", {}, "info", "device", "bfloat16"),
        (DEMO, "T4", {"dtype": "bfloat16"}, "error", "unsupported", "bfloat16"),
        (DEMO, "2x H100", {"tensor_parallel_size": 4}, "error", "invalid_option", "has 2 devices."),
        (DEMO, "2x H100", {"data_parallel_size": 4}, "error", "invalid_option", "has 2 devices."),
        (DEMO, "4x H100", {"tensor_parallel_size": 2}, "info", "device", "2 of the 4 devices"),
        (DEMO, "H100", {"quantization": "awk"}, "error", "unsupported_quantization", "`awk`"),
        (DEMO, (TINY,), {}, "error", "out_of_memory", "A tiny one has 0.0 GiB"),
    ],
)
def test_what_is_found(
    model: str,
    machine: str | tuple[Device, ...],
    options: dict[str, Any],
    severity: str,
    reason: str,
    words: str,
) -> None:
    found = findings(model, machine, **options)
    matching = [f for f in found if (f.severity, f.reason) == (severity, reason)]
    assert any(words in finding.message for finding in matching), found
    assert all(finding.remedy for finding in matching)


def test_a_misspelt_method_is_answered_with_what_may_have_been_meant() -> None:
    found = findings(DEMO, "H100", quantization="awk")
    refused = next(finding for finding in found if "`awk`" in finding.message)
    assert refused.remedy.startswith("Did you mean `awq`? It has: ")
    assert (refused.details["option"], refused.details["nearest"]) == ("quantization", "awq")


def test_weights_are_divided_among_the_devices(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("models") / "model"
    model = str(model_cards.write(model_cards.read("llama-2-13b"), folder))
    options = {"skip_tokenizer_init": True}
    (refused,) = findings(model, "24GiB", **options)
    assert (refused.severity, refused.reason) == ("error", "out_of_memory")
    assert refused.details["needed_bytes"] == pytest.approx(24.2 * memory.GIB, rel=0.01)
    assert refused.remedy.startswith("Any of these would make it fit: ")
    assert "2 devices" in refused.remedy
    assert findings(model, "2x 24GiB", tensor_parallel_size=2, **options) == []
    # Of a single device there are as many as are asked for.
    assert findings(model, "24GiB", tensor_parallel_size=2, **options) == []
    _, refused = findings(model, "2x 24GiB", **options)
    assert refused.reason == "out_of_memory"


def test_copies_of_a_model_in_one_engine_take_a_device_each() -> None:
    assert findings(DEMO, "2x H100", data_parallel_size=2) == []


def test_a_context_that_does_not_fit_is_a_warning(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("models") / "model"
    model = str(model_cards.write(model_cards.read("llama-3.1-8b"), folder))
    (warned,) = findings(model, "24GiB", skip_tokenizer_init=True)
    assert (warned.severity, warned.reason) == ("warning", "out_of_memory")
    assert "a request of 131072 tokens needs 16.0 GiB" in warned.message
    assert "A context of" in warned.remedy


def test_this_machine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_cpu", lambda: 0)
    assert findings(AWQ, "H100") == []


def test_a_value_that_vllm_does_not_take() -> None:
    checked = check(DEMO, {"max_model_len": "many"}, machine=named("H100"))
    with pytest.raises(Exception, match="`max_model_len` cannot be 'many'"):
        checked.refuse()


def test_an_architecture_that_is_in_no_registry(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["MadeUpForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    (warned,) = findings(str(folder), "H100")
    assert (warned.severity, warned.reason) == ("warning", "unsupported_model")


@pytest.mark.parametrize("named_ones", [[], {"0": "x"}, [5]])
def test_architectures_that_are_no_names(tmp_path: Path, named_ones: Any) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": named_ones}))
    machine = named("H100")
    report = facts.report(check(str(folder), {}, machine=machine), machine)
    assert report["architecture"] is None
