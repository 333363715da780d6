"""Runs in every process that vLLM starts, through the entry point ``vllm.general_plugins``."""

from vllm_bridge import heartbeat, patches
from vllm_bridge.quantization import registry


def register() -> None:
    """Called by vLLM, possibly more than once in a process."""
    heartbeat.start()
    patches.apply()
    for method in registry.every():
        method.install()
