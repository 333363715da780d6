"""Says what the installed vLLM offers, and what the bridge takes of it.

    python surface.py > ../../test/support/surface.tsv

prints a line for each field of vLLM's classes of parameters and for each public member of its
engines, `class<TAB>name`, and the same for what a request may say to the bridge, `bridge
class<TAB>name`. The test that Elixir covers it reads them; that the file is of the installed vLLM
is tested here, where vLLM is imported anyhow.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from vllm import LLM, PoolingParams, SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_bridge.beam_search import beam_search_fields
from vllm_bridge.params import SamplingParamsFactory
from vllm_bridge.pooling import pooling_fields


def fields(parameters: type[Any]) -> list[str]:
    """The names of a class's fields, of a dataclass or of a msgspec Struct."""
    if dataclasses.is_dataclass(parameters):
        return [field.name for field in dataclasses.fields(parameters)]
    return [field.name for field in msgspec.structs.fields(parameters)]


def lines() -> Iterator[str]:
    parameters = (SamplingParams, PoolingParams, StructuredOutputsParams, BeamSearchParams)
    owners: dict[str, Iterable[str]] = {one.__name__: fields(one) for one in parameters}
    owners |= {engine.__name__: dir(engine) for engine in (LLM, AsyncLLM)}
    owners |= {
        "bridge SamplingParams": SamplingParamsFactory({}).names,
        "bridge PoolingParams": pooling_fields(),
        "bridge BeamSearchParams": beam_search_fields(),
    }
    for owner, names in owners.items():
        for name in sorted(names):
            if not name.startswith("_"):
                yield f"{owner}\t{name}"


if __name__ == "__main__":
    print(*lines(), sep="\n")
