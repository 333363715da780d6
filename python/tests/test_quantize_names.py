"""What GPTQ, AWQ and compressed-tensors are called and which options have an effect, without the
libraries that make them; with them it is in ``test_quantize_calibrated.py``."""

import dataclasses
import sys
from types import ModuleType
from typing import Any

import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import awq, compressed, formats, gptq, gptqmodel
from vllm_bridge.jobs.quantize.producer import Option, all_options


@dataclasses.dataclass
class GPTQConfig:
    """Some fields as gptqmodel 7.6.0 has them, and two that are not for users."""

    bits: int | str | bytes = 4
    group_size: int = 128
    desc_act: bool | None = None
    sym: bool = True
    method: object = None
    device: str | None = None
    format: object = object()
    damp_percent: float | None = None


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("gptqmodel.quantization.config")
    module.__dict__["GPTQConfig"] = GPTQConfig
    monkeypatch.setattr(gptqmodel, "library", lambda: None)
    for name in ("gptqmodel", "gptqmodel.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def algorithms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of llmcompressor 0.14.0.1, with their defaults."""
    known = {
        "scheme": "W4A16",
        "algorithm": None,
        "group_size": None,
        "ignore": ["lm_head"],
        "smoothing_strength": None,
        "block_size": 128,
        "dampening_frac": 0.01,
        "actorder": None,
        "duo_scaling": True,
        "n_grid": 20,
    }
    declared = {name: Option(name, (), default) for name, default in known.items()}
    monkeypatch.setattr(compressed, "_declared", lambda: declared)
    return known


@pytest.mark.usefixtures("library")
def test_gptq_has_the_options_of_its_library_that_change_what_is_made() -> None:
    found = gptq.options()
    assert list(found) == ["bits", "group_size", "desc_act", "sym", "format", "damp_percent"]
    assert found["bits"].allowed == (2, 3, 4, 8)
    assert found["group_size"] == Option(
        "group_size", (int,), 128, (), "How many weights of a row share a scale; -1 is for all."
    )
    assert found["desc_act"].types == (bool,)
    assert found["damp_percent"].types == (float,)
    assert found["format"].allowed == ("gptq", "gptq_v2")
    assert gptq.presets()["3bit"] == {"bits": 3}


@pytest.mark.usefixtures("library")
def test_unknown_options_of_gptq_get_the_nearest() -> None:
    producer: Any = gptq
    with pytest.raises(BridgeError) as caught:
        all_options(producer, {"groupsize": 64})
    assert caught.value.message == (
        "Unknown option of gptq `groupsize`. Did you mean `group_size`?"
    )


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "gptq-4bit-128g"),
        ({"bits": 2, "group_size": -1}, "gptq-2bit-channel"),
        ({"desc_act": True, "sym": False}, "gptq-4bit-128g-act-asym"),
    ],
)
def test_gptq_is_called_by_its_bits_and_groups(options: dict[str, Any], label: str) -> None:
    usual = {"bits": 4, "group_size": 128, "desc_act": None, "sym": True}
    assert gptq.label(usual | options) == label


def test_awq_is_called_by_its_bits_and_groups() -> None:
    assert awq.label({"bits": 4, "group_size": 64}) == "awq-4bit-64g"


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "W4A16"),
        ({"group_size": 64}, "W4A16-64g"),
        ({"group_size": -1, "algorithm": "rtn"}, "W4A16-channel-rtn"),
        ({"algorithm": "gptq"}, "W4A16"),
        ({"scheme": "W8A8", "smoothing_strength": 0.5}, "W8A8-smooth"),
        ({"scheme": "FP8_DYNAMIC", "algorithm": "gptq"}, "FP8_DYNAMIC-gptq"),
    ],
)
def test_compressed_tensors_are_called_by_their_scheme(
    algorithms: dict[str, Any], options: dict[str, Any], label: str
) -> None:
    assert compressed.label(algorithms | options) == label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scheme": "W8A8", "dampening_frac": 0.1},
            "`dampening_frac` has no effect: the algorithm is `rtn`. Leave it out, or set "
            "`algorithm` to `gptq`.",
        ),
        (
            {"n_grid": 40},
            "`n_grid` has no effect: the algorithm is `gptq`. Leave it out, or set `algorithm` to "
            "`awq`.",
        ),
        (
            {"scheme": "FP8", "group_size": 64},
            "`group_size` has no effect: FP8 has no groups. Leave it out.",
        ),
    ],
)
def test_options_without_an_effect_are_refused(
    algorithms: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BridgeError) as caught:
        compressed.check(None, algorithms | options)
    assert caught.value.reason == "invalid_option"
    assert caught.value.message == message


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_where_a_library_is_missing_it_is_said_how_to_have_it(name: str) -> None:
    with pytest.raises(BridgeError) as caught:
        formats.output(name, None)
    assert caught.value.reason == "quantize_not_installed"
    assert caught.value.remedy == "Run `mix vllm.setup --with quantize`."
