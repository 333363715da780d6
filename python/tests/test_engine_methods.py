from typing import Any

import pytest

from vllm_bridge.chat import ChatParams
from vllm_bridge.engine.engine import GenerateParams
from vllm_bridge.engine_methods import _as_given
from vllm_bridge.errors import BridgeError

GIVEN: dict[str, Any] = {"structured_outputs": {"choice": ["a"]}}


@pytest.mark.parametrize(
    ("params", "option"),
    [
        (GenerateParams(sampling_params=GIVEN), "structured_outputs"),
        (GenerateParams(sampling_params=GIVEN, parse=True), "schema"),
        (ChatParams(sampling_params=GIVEN, tools=[]), "structured_outputs"),
        (ChatParams(sampling_params=GIVEN, parse=True), "schema"),
        (ChatParams(tools=[{}], tool_choice="required"), "tools"),
    ],
)
def test_errors_name_the_option_that_the_caller_gave(params: Any, option: str) -> None:
    with pytest.raises(BridgeError) as caught, _as_given(params):
        raise BridgeError("invalid_option", "No.", {"option": "structured_outputs"})
    assert caught.value.details["option"] == option


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(BridgeError) as caught, _as_given(GenerateParams(parse=True)):
        raise BridgeError("invalid_option", "No.", {"option": "n"})
    assert caught.value.details == {"option": "n"}
