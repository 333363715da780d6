"""``python -m vllm_bridge.jobs.quantize``: makes or checks one output for another Python, which has
started it in the quantizing environment.

What is asked for comes as JSON on standard input: ``{"check": params}`` of ``quantize_formats`` or
``{"make": params}`` of ``quantize``. What is told is a line of JSON each on standard output:
``{"progress": …}``, and at the end ``{"result": …}`` or ``{"error": …}``.
"""

import json
import os
import sys
from typing import Any

import msgspec

from vllm_bridge.errors import BridgeError, internal_error
from vllm_bridge.jobs import quantize, task
from vllm_bridge.jobs.modesty import be_modest


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is for the log

    def tell(said: dict[str, Any]) -> None:
        out.write(json.dumps(said) + "\n")
        out.flush()

    try:
        be_modest()
        tell({"result": _served(json.load(sys.stdin), tell)})
    except BridgeError as error:
        tell({"error": error.to_wire()})
    except Exception as error:  # whose traceback goes with it
        tell({"error": internal_error(error).to_wire()})


def _served(asked: dict[str, Any], tell: Any) -> Any:
    if "check" in asked:
        return quantize.check(msgspec.convert(asked["check"], quantize.FormatsParams))
    params = msgspec.convert(asked["make"], quantize.QuantizeParams)
    with task.told_apart():
        return quantize.make(
            params,
            lambda phase, done=None, total=None: tell(
                {"progress": {"step": phase, "done": done, "total": total}}
            ),
        )


if __name__ == "__main__":
    main()
