"""The packages that are installed beside this one."""

from importlib import metadata
from typing import Any

import msgspec

from vllm_bridge.rpc.call import Call


class PackagesParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``packages``; see guides/protocol.md."""

    names: list[str]


async def packages(_call: Call, params: PackagesParams) -> dict[str, str]:
    """The versions of the distributions of these names, as far as they are installed."""
    versions = {}
    for name in params.names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


METHODS: dict[str, Any] = {"packages": (PackagesParams, packages)}
