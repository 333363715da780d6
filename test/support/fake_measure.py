"""A worker of jobs that starts no engine: what a model is measured to be is in its name.

`even` expects each of four tokens alike; `skewed:P` gives P to the first of them; `error:REASON`
cannot be loaded; `hang` never answers; `other` has another tokenizer. `pid:FILE:MODEL` writes the
worker's process id to FILE before it is MODEL.
"""

import asyncio
import os

import numpy as np

from vllm_bridge import __main__ as worker
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs import compare, measure
from vllm_bridge.jobs.distributions import Distributions, perplexity
from vllm_bridge.rpc.table import Method, Table

PLACES = 8


async def fake(call, params):
    what, _, argument = params.model.partition(":")
    if what == "pid":
        path, _, what = argument.partition(":")
        with open(path, "w") as file:
            file.write(str(os.getpid()))
    if what == "error":
        raise BridgeError(argument, "It cannot be loaded.")
    call.notify("progress", {"id": call.id, "phase": "measuring", "done": 1, "total": 8})
    if what == "hang":
        await asyncio.Event().wait()
    first = float(argument) if what == "skewed" else 0.25
    row = np.log(np.array([first, *[(1 - first) / 3] * 3], np.float32))
    made = Distributions(
        tokens=np.full(PLACES + 1, what == "other", np.uint32),
        lengths=np.array([PLACES + 1], np.uint32),
        chosen=np.full(PLACES, row[0]),
        ids=np.tile(np.arange(4, dtype=np.uint32), (PLACES, 1)),
        logprobs=np.tile(row, (PLACES, 1)),
        vocabulary=4,
        figures={},
    )
    quantized = what == "skewed"
    made.figures.update(
        model=params.model,
        format="awq (4 bits)" if quantized else "plain",
        method="awq" if quantized else None,
        bits=4 if quantized else None,
        bits_per_weight=4.25 if quantized else 16.0,
        activation_bits=None,
        parameters=8_000_000_000,
        bytes=4_250_000_000 if quantized else 16_000_000_000,
        memory=None,
        tokens=min(PLACES, params.max_tokens),
        perplexity=perplexity(made),
        bits_per_byte=1.0,
        tokens_per_second=20.0,
        answers=params.texts or ["held out"],
        answer_ids=[[1, 2]],
        note=None,
    )
    made.save(params.out)
    return made.figures


def table():
    rows = {"measure": (measure.MeasureParams, fake), **compare.METHODS}
    return Table({name: Method(params, serve) for name, (params, serve) in rows.items()})


worker.KINDS["job"] = table
worker.work("job")
