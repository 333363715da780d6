"""Access tokens of the hub."""

from typing import Any

from vllm_bridge.errors import BridgeError


def check(token: Any) -> None:
    """Looks whether the option ``hf_token`` can be a token; the client sends it as it is, and what
    it says of one with a line end in it sounds like a fault of the network.

    Raises:
        BridgeError: ``invalid_option``, which does not tell what it is
    """
    if token is None or isinstance(token, bool):
        return
    if (
        isinstance(token, str)
        and token.isascii()
        and token.isprintable()
        and token.split() == [token]
    ):
        return
    raise BridgeError(
        "invalid_option",
        "`hf_token` is no access token: these are a word of letters, digits and `_`.",
        {"option": "hf_token"},
        remedy="Give it without what is around it, such as the line end of a file.",
    )
