"""The params of questions about a model."""

import msgspec
import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.tools.model import MachineParams


def test_a_machine_is_named_by_one_device_or_by_each() -> None:
    assert MachineParams("m").machine() is None
    one = MachineParams("m", device="2x A10G").machine()
    assert one is not None
    assert [device.name for device in one] == ["A10G 24GB", "A10G 24GB"]
    each = MachineParams("m", devices=["24GiB", "A10G"]).machine()
    assert each is not None
    assert [device.kind for device in each] == ["gpu", "cuda"]
    assert MachineParams("m", devices=["24GiB"]).visible() is None


def test_numbers_are_devices_of_this_machine() -> None:
    params = msgspec.convert({"model": "m", "devices": [[0, "1"], [2, 3]]}, MachineParams)
    assert params.machine() is None
    assert params.visible() == ["0", "1"]


def test_a_machine_that_is_named_twice_is_refused() -> None:
    with pytest.raises(BridgeError) as caught:
        MachineParams("m", device="H100", devices=["H100"]).machine()
    assert caught.value.reason == "invalid_option"
    assert caught.value.remedy == "Give one of them."
