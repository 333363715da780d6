"""The folder of what this library makes and must not lose: models, jobs, the registry of names.

Elixir says where it is, by ``config :ex_vllm, data_dir:``. A worker that was not told has none.
"""

import os
from typing import Final

from vllm_bridge.errors import BridgeError

VARIABLE: Final = "EX_VLLM_DATA"


def folder() -> str | None:
    """Where it is; it need not be there yet. None where nobody said."""
    given = os.environ.get(VARIABLE)
    return os.path.abspath(os.path.expanduser(given)) if given else None


def required() -> str:
    """The same, for what cannot go on without.

    Raises:
        BridgeError: ``unsupported`` where nobody said
    """
    if (found := folder()) is not None:
        return found
    raise BridgeError(
        "unsupported",
        "This worker was not told where models and their names are kept.",
        remedy=f"Set `{VARIABLE}` to the folder; from Elixir it is `config :ex_vllm, data_dir:`.",
    )
