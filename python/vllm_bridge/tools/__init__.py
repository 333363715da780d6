"""What a worker without an engine can do: the table of its methods.

It starts in half a second, because nothing of it imports torch or vLLM before a method needs them.
What can be read of models and of the hub without an engine belongs here: a method is a row of
``METHODS`` in the module of its subject, which imports what it needs when it is asked.
"""

from vllm_bridge.rpc.table import Method, Table
from vllm_bridge.tools import hub, jobs, packages, plots, prompts, quantization, registry


def table() -> Table:
    modules = (packages, quantization, hub, registry, jobs, prompts, plots)
    rows = {name: row for module in modules for name, row in module.METHODS.items()}
    return Table({name: Method(params, serve) for name, (params, serve) in rows.items()})
