"""A real engine on the demo model, for the tests of a file."""

import asyncio
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest

import stopping
from conftest import MODELS
from vllm_bridge.engine.engine import Engine, GenerateParams
from vllm_bridge.engine.start import load
from vllm_bridge.errors import BridgeError

T = TypeVar("T")

GREEDY = {"temperature": 0.0, "max_tokens": 32}


class Running:
    """An engine and the event loop that it lives on."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loaded: Engine | None = None
        self.phases: list[str] = []
        self._requests = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 120))

    @property
    def engine(self) -> Engine:
        assert self.loaded is not None
        return self.loaded

    def load(self, model: Path | str = MODELS / "demo", **options: Any) -> dict[str, Any]:
        options = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28} | options
        # vLLM has a limit of its own for this, and what is cut off would be left behind.
        self.loaded = self.loop.run_until_complete(load(str(model), options, self._progress))
        return self.loaded.info()

    def _progress(self, phase: str, *_figures: Any) -> None:
        self.phases.append(phase)

    async def generate(self, prompt: Any, priority: int = 0, **params: Any) -> dict[str, Any]:
        self._requests += 1
        asked = GenerateParams(prompt, GREEDY | params, priority=priority)
        return await self.engine.generate(str(self._requests), asked)

    def complete(self, prompt: Any, **params: Any) -> dict[str, Any]:
        """The first completion."""
        completion: dict[str, Any] = self.run(self.generate(prompt, **params))["outputs"][0]
        return completion

    def complete_all(self, prompts: Iterable[str], **params: Any) -> dict[str, str]:
        """The text of the first completion of each prompt, all asked for together."""

        async def ask_all() -> list[dict[str, Any]]:
            return await asyncio.gather(*(self.generate(prompt, **params) for prompt in prompts))

        return {a["prompt"]: a["outputs"][0]["text"] for a in self.run(ask_all())}

    def refused(self, prompt: Any, priority: int = 0, **params: Any) -> BridgeError:
        with pytest.raises(BridgeError) as caught:
            self.run(self.generate(prompt, priority, **params))
        # An error of one request is nobody else's.
        assert self.complete("The capital of France is")["text"] == " Paris."
        return caught.value

    def stop(self) -> None:
        stopping.stop(self.engine._llm)
        self.loaded = None
        self.loop.run_until_complete(asyncio.sleep(0))
