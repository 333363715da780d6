"""What a worker of the kind ``job`` can do: one long task, at whose end it ends.

It runs in the environment that the task needs, the quantizing one or the serving one, so that
nothing of it imports a library before a method needs it. A method is a row of ``METHODS`` in the
module of its subject.
"""

from typing import Any

from vllm_bridge.jobs import compare, finetune, measure, quantize
from vllm_bridge.rpc.table import Method, Table


def table() -> Table:
    rows: dict[str, Any] = measure.METHODS | compare.METHODS | quantize.METHODS | finetune.METHODS
    return Table({name: Method(params, serve) for name, (params, serve) in rows.items()})
