"""vLLM's engine process can be asked which requests its scheduler has begun with; see ``queueing``.

vLLM tells it nobody.
"""

import sys

from vllm_bridge import queueing
from vllm_bridge.patches import add

SEEN = ("0.31.", "0.32.")
TOUCHES = {"vllm.v1.engine.core": ("EngineCore",)}


def apply() -> None:
    # Where vLLM's engine lives, it is imported by now.
    core = sys.modules.get("vllm.v1.engine.core")
    if core is not None:
        add(core.EngineCore, queueing.METHOD, queueing.scheduled)
