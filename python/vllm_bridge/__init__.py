"""The Python side of VLLM for Elixir: one vLLM engine behind a MessagePack-RPC pipe.

``python -m vllm_bridge`` runs a worker on file descriptors 3 and 4; the protocol is in
``guides/protocol.md``.
"""

__version__ = "0.1.0"

PROTOCOL_VERSION = 2

# The vLLM releases that this version works with: prefixes of the version number.
VLLM_VERSIONS = ("0.32.",)
