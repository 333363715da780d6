"""Says what the installed vLLM offers, and what the bridge takes of it.

    python surface.py

prints a line for each field of vLLM's classes of parameters and for each public member of its
engines, `class<TAB>name`, and the same for what a request may say to the bridge, `bridge
class<TAB>name`. The test that Elixir covers it reads them.
"""

import dataclasses
from collections.abc import Iterable
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


def show(owner: str, names: Iterable[str]) -> None:
    for name in names:
        if not name.startswith("_"):
            print(f"{owner}\t{name}")


if __name__ == "__main__":
    for parameters in (SamplingParams, PoolingParams, StructuredOutputsParams, BeamSearchParams):
        show(parameters.__name__, fields(parameters))
    for engine in (LLM, AsyncLLM):
        show(engine.__name__, dir(engine))
    show("bridge SamplingParams", SamplingParamsFactory({}).names)
    show("bridge PoolingParams", pooling_fields())
    show("bridge BeamSearchParams", beam_search_fields())
