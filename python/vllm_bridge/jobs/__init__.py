"""What a worker of the kind ``job`` can do: one long task, at whose end it ends.

It runs in the environment that the task needs, the quantizing one or the serving one, so that
nothing of it imports a library before a method needs it. A method is a row of ``METHODS`` in the
module of its subject.
"""

import contextlib
import os
from typing import Any

from vllm_bridge.jobs import compare, finetune, measure, quantize
from vllm_bridge.rpc.table import Method, Table

# How much less urgent than others this process is, see nice(2).
NICE = "EX_VLLM_NICE"

# Of 1000: it goes before an engine when memory is short.
OOM_SCORE = "500"


def table() -> Table:
    rows: dict[str, Any] = measure.METHODS | compare.METHODS | quantize.METHODS | finetune.METHODS
    return Table({name: Method(params, serve) for name, (params, serve) in rows.items()})


def be_modest() -> None:
    """Has this process and those below it stand back behind engines."""
    os.nice(int(os.environ.get(NICE, "0")))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(OOM_SCORE)
