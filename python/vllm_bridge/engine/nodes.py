"""How the machines of an engine over several find each other."""

import ipaddress
import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


def meet(arguments: Mapping[str, Any]) -> None:
    """Has vLLM's processes of this machine listen on the network that leads to the head, where
    there are others. By themselves they take that of the default route, or the loopback interface.

    Args:
        arguments: of the engine, by vLLM's names
    """
    if arguments.get("nnodes", 1) == 1:
        return
    address = own_address(arguments.get("master_addr", "127.0.0.1"))
    os.environ.setdefault("VLLM_HOST_IP", address)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface(address))
    if ipaddress.ip_address(address).is_global:
        logger.warning(
            "vLLM's processes talk to those of other nodes over %s, a public address, without "
            "authentication or encryption: whoever reaches it can run code here",
            address,
        )


def own_address(head: str) -> str:
    """The address of this machine on the network that leads to the head."""
    family, kind, _, _, there = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as route:
        route.connect(there)  # which sends nothing
        return str(route.getsockname()[0])


def interface(address: str) -> str:
    """The name of the interface that has an address: "eth0"."""
    import psutil  # vLLM's own

    for name, addresses in psutil.net_if_addrs().items():
        # One of IPv6 may have its interface behind it: "fe80::1%eth0".
        if any(one.address.partition("%")[0] == address for one in addresses):
            return str(name)
    raise OSError(f"no interface of this machine has the address {address}")
