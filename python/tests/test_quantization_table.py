"""The table of the quantization methods of the installed vLLM."""

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import platforms

import loading
from vllm_bridge.quantization import availability, naming, registry, table
from vllm_bridge.quantization.table import Row, Use


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with loading.environment():
        yield


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.name: row for row in table.rows()}


def test_every_method_of_vllm_has_a_row_and_only_one(rows: dict[str, Row]) -> None:
    names = [name for row in rows.values() for name in (row.name, *row.other_names)]
    assert set(naming.methods()) <= set(names)
    assert set(registry.extras()) <= rows.keys()
    assert len(names) == len(set(names))
    assert "exl2" not in names  # which no vLLM loads


def test_what_runs_is_what_the_doctor_and_errors_say(rows: dict[str, Row]) -> None:
    formats = [use.name for row in rows.values() for use in row.formats if use.runs]
    online = [name for name, row in rows.items() if row.in_flight and row.in_flight.runs]
    assert sorted(formats) == sorted(availability.formats())
    assert sorted(online) == sorted(availability.online())
    assert "gguf (Q4_K)" in formats


def test_a_method_that_only_loads_checkpoints(rows: dict[str, Row]) -> None:
    awq = rows["awq"]
    assert {"auto_awq", "awq_marlin", "autoawq"} <= set(awq.other_names)
    assert awq.formats == (Use("awq (4 bits)", 4, True, None),)
    assert (awq.title, awq.bits, awq.pre_quantized, awq.in_flight) == ("AWQ", (4,), True, None)
    assert (awq.extra, awq.installed, awq.capability) == (None, True, 7.5)
    assert (awq.runs, awq.why_not) == (True, None)
    assert rows["gptq"].bits == (2, 3, 4, 8)
    # Of these no format is known that could be tried.
    for name in ("quark", "modelopt", "modelopt_fp4"):
        assert rows[name].pre_quantized
        assert (rows[name].in_flight, rows[name].runs) == (None, None)
        assert rows[name].why_not == "It can only be tried with a checkpoint."


def test_methods_that_quantize_in_flight(rows: dict[str, Row]) -> None:
    fp8 = rows["fp8_per_channel"]
    assert fp8.in_flight == Use("fp8_per_channel", 8, True, None)
    assert (fp8.formats, fp8.pre_quantized) == ((), False)
    assert rows["bitsandbytes"].dtype == "int4"
    assert rows["torchao"].pre_quantized
    assert rows["torchao"].in_flight is not None
    experts = rows["experts_int8"]
    assert experts.runs is None
    assert experts.why_not == "It has to do with the experts of mixtures only."


def test_it_goes_over_the_wire(rows: dict[str, Row]) -> None:
    wire = rows["bitsandbytes"].to_wire()
    assert wire["in_flight"]["bits"] == 4
    assert [use["name"] for use in wire["formats"]] == [
        "bitsandbytes (4 bits)",
        "bitsandbytes (8 bits)",
    ]


def test_what_is_not_installed_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = registry.of("bitsandbytes").extra
    assert missing is not None
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name in missing.modules.values() else find_spec(name, *more),
    )
    row = next(row for row in table.rows() if row.name == "bitsandbytes")
    assert (row.installed, row.runs) == (False, False)
    assert row.why_not is not None
    assert row.why_not.endswith("Run `mix vllm.setup --with bitsandbytes`.")
    assert {use.runs for use in row.formats} == {False}
    assert row.in_flight is not None
    assert row.in_flight.why_not == row.why_not


def test_a_gpu_that_is_too_old_is_told_before_a_layer_is_made(
    monkeypatch: pytest.MonkeyPatch, rows: dict[str, Row]
) -> None:
    def refuse(name: str) -> None:
        if name == "hqq":
            raise ValueError("hqq quantization is currently not supported in toys.")

    old: Any = SimpleNamespace(
        is_cuda=lambda: True,
        verify_quantization=refuse,
        get_device_capability=lambda: platforms.interface.DeviceCapability(7, 0),
    )
    monkeypatch.setattr(platforms, "_current_platform", old)
    said = {row.name: row for row in table.rows()}
    assert said["awq"].why_not == "It needs a GPU of compute capability 7.5; this one has 7.0."
    assert said["awq"].runs is False
    assert said["squeezellm"].runs is rows["squeezellm"].runs is True
    assert said["hqq"].why_not == "hqq quantization is currently not supported in toys."
