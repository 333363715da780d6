"""The params of questions about a model, which are what an engine would be started with."""

from typing import Any

import msgspec

from vllm_bridge.errors import BridgeError
from vllm_bridge.sizing.devices import Device, named


class ModelParams(msgspec.Struct, forbid_unknown_fields=True):
    """A model and the options of an engine, as the user gave them."""

    model: str
    options: dict[str, Any] = {}


class MachineParams(ModelParams, forbid_unknown_fields=True):
    """The same, and the machine that it is about.

    Args:
        device: its device, or several as ``"2x A10G"``
        devices: each of them; or, as lists, what the replicas of an engine are given of this
            machine's
    """

    device: str | None = None
    devices: list[str | list[str | int]] | None = None

    def machine(self) -> tuple[Device, ...] | None:
        """The devices that were named; None for those of this machine.

        Raises:
            BridgeError: ``invalid_option``
        """
        if self.device is not None and self.devices is not None:
            raise BridgeError(
                "invalid_option",
                "`device` and `devices` say the same.",
                {"option": "devices", "value": self.devices},
                remedy="Give one of them.",
            )
        if self.devices is None:
            return None if self.device is None else named(self.device)
        names = [name for name in self.devices if isinstance(name, str)]
        return named(names) if names else None

    def visible(self) -> list[str] | None:
        """The devices of this machine that the first replica is given; None for all of them."""
        for replica in self.devices or ():
            if not isinstance(replica, str):
                return [str(device) for device in replica]
        return None
