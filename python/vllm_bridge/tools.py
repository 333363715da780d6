"""What a worker without an engine can do: the table of its methods.

It starts in half a second, because nothing of it imports torch or vLLM before a method needs
them, and only ``quantization`` does. What can be read of models and of the hub without an engine
belongs here.
"""

from importlib import metadata

import msgspec

from vllm_bridge.rpc.call import Call
from vllm_bridge.rpc.table import Method, NoParams, Table


class PackagesParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``packages``; see guides/protocol.md."""

    names: list[str]


def table() -> Table:
    return Table(
        {
            "packages": Method(PackagesParams, packages),
            "quantization": Method(NoParams, quantization),
        }
    )


async def packages(_call: Call, params: PackagesParams) -> dict[str, str]:
    """The versions of the distributions of these names, as far as they are installed."""
    versions = {}
    for name in params.names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


async def quantization(_call: Call, _params: NoParams) -> dict[str, list[str]]:
    """What the installed vLLM computes on this device. Blocks for the seconds of its import."""
    from vllm.plugins import load_general_plugins

    from vllm_bridge.quantization import availability

    load_general_plugins()
    return {"formats": list(availability.formats()), "online": list(availability.online())}
