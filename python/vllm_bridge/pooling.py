"""Vectors, classes and scores: what an engine with vLLM's pooling runner makes of prompts.

What belongs to a task is left to vLLM's own processors, the ones behind ``LLM.embed`` and
``LLM.score``: they truncate, pair texts and apply templates before the model, and compare
vectors after it.
"""

import asyncio
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from vllm_bridge import diagnosis, elixir, finish, tokenization
from vllm_bridge.errors import BridgeError, map_exceptions
from vllm_bridge.params import Field, checked, invalid_value
from vllm_bridge.queueing import Submit
from vllm_bridge.rpc.protocol import pack_u32

T = TypeVar("T")

# The tasks that give a tensor for a prompt, and what `convert` makes a model fit for each.
CONVERSIONS = {
    "embed": "embed",
    "classify": "classify",
    "token_embed": "embed",
    "token_classify": "classify",
}

# Fields of PoolingParams that vLLM, or this package, sets itself: the task is the method's, and
# the others are how vLLM's parts talk to each other.
_NOT_FROM_OUTSIDE = {"task", "requires_token_ids", "late_interaction_params", "output_kind"}


class PoolParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``pool``; see guides/protocol.md."""

    prompt: Any = None
    task: str | None = None
    pooling_params: dict[str, Any] = {}
    tokenization_kwargs: dict[str, Any] = {}
    priority: int = 0
    timeout: float | None = None
    queue_timeout: float | None = None


class ScoreParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``score``; see guides/protocol.md."""

    data_1: list[str]
    data_2: list[str]
    pooling_params: dict[str, Any] = {}
    tokenization_kwargs: dict[str, Any] = {}
    chat_template: str | None = None
    priority: int = 0
    timeout: float | None = None
    queue_timeout: float | None = None


class Pooler:
    """Serves the pooling requests of an engine.

    Args:
        llm: the ``AsyncLLM``
        tasks: what it can do, as vLLM names it
        early_end: makes the error for a prompt that ended without a result
    """

    def __init__(
        self,
        llm: Any,
        tasks: tuple[str, ...],
        early_end: Callable[[finish.Meaning, str, Any], Awaitable[BridgeError]],
    ) -> None:
        from vllm.entrypoints.pooling.factories import init_pooling_io_processors
        from vllm.renderers.chat_utils import ChatTemplateConfig

        self._llm = llm
        self._early_end = early_end
        self._tasks = tasks
        # vLLM gives an engine one task of those that its model is fit for.
        self.task: str = llm.model_config.get_pooling_task(tasks)
        self._processors: dict[str, Any] = init_pooling_io_processors(
            supported_tasks=tasks,
            vllm_config=llm.vllm_config,
            renderer=llm.renderer,
            chat_template_config=ChatTemplateConfig(),
        )
        self._pooling = pooling_fields()
        # As much as vLLM's own batch interface hands over at once: the rest waits outside.
        self._room = 2 * llm.vllm_config.scheduler_config.max_num_seqs

    @property
    def labels(self) -> list[str] | None:
        """The classes' names, by index; none where the model has none or is no classifier."""
        names = getattr(self._llm.model_config.hf_config, "id2label", None) or {}
        if CONVERSIONS.get(self.task) != "classify" or set(names) != set(range(len(names))):
            return None
        return [str(names[index]) for index in range(len(names))]

    async def pool(
        self, request_id: str, prompt: Any, params: PoolParams, submit: Submit
    ) -> dict[str, Any]:
        """One prompt's tensor. Cancelling it aborts it in vLLM.

        Args:
            prompt: that of the params, as vLLM takes it
            submit: told when vLLM is given it

        Raises:
            BridgeError: with the reason why there is none
        """
        from vllm.entrypoints.pooling.typing import OfflineEncodeInputsContext

        task = params.task or self.task
        if task not in CONVERSIONS or task != self.task:
            raise wrong_task(task, self.task, self._tasks)
        with map_exceptions(self._error_about(params)):
            context = OfflineEncodeInputsContext(
                pooling_task=task,
                prompts=[prompt],
                tokenization_kwargs=tokenization.for_pooling(params.tokenization_kwargs),
                pooling_params=self._params(params.pooling_params),
                lora_request=None,
                priorities=params.priority,
            )
            processor = self._processors[task]
            factory, _count = processor.get_request_factory_offline(context)
            items = [(request_id, item) for item in factory()]
            (output,) = await self._run(processor, items, submit)
        return pooling_output(output)

    async def score(
        self, request_id: str, params: ScoreParams, submit: Submit
    ) -> list[dict[str, Any]]:
        """A score for each pair of texts: of one with each of several, or of two lists.

        Args:
            submit: told of each pair, or text, that vLLM is given

        Raises:
            BridgeError: with the reason why there are none
        """
        from vllm.entrypoints.pooling.typing import (
            OfflineOutputsContext,
            OfflineScoringInputsContext,
        )
        from vllm.tasks import SCORE_TYPE_MAP

        processor = self._processors.get(SCORE_TYPE_MAP.get(self.task, ""))
        if processor is None:
            raise self._no_scores()
        with map_exceptions(self._error_about(params)):
            pooling_params = self._params(params.pooling_params)
            pooling_params.task = processor.pooling_task
            data = processor.valid_inputs(params.data_1, params.data_2)
            context = OfflineScoringInputsContext(
                pooling_task=processor.pooling_task,
                scoring_data=data,
                pooling_params=pooling_params,
                tokenization_kwargs=tokenization.for_pooling(params.tokenization_kwargs),
                lora_request=None,
                chat_template=params.chat_template,
                priorities=params.priority,
            )
            # A tokenizer is not to be used by two threads at once; here one may be, so this runs
            # where vLLM renders.
            factory, _count = await asyncio.get_running_loop().run_in_executor(
                self._llm.renderer._executor, processor.get_request_factory_offline, context
            )
            outputs = await self._run(
                processor,
                [(f"{request_id}-{index}", item) for index, item in enumerate(factory())],
                submit,
            )
            outputs = await asyncio.to_thread(
                processor.post_process_offline,
                OfflineOutputsContext(outputs=outputs, n_queries=len(data.data_1)),
            )
        return [pooling_output(output) for output in outputs]

    async def _run(
        self, processor: Any, items: Iterable[tuple[str, Any]], submit: Submit
    ) -> list[Any]:
        room = asyncio.Semaphore(self._room)

        async def one(request_id: str, item: Any) -> Any:
            async with room:
                rendered = await processor.render_async(item)
                submit(request_id)
                stream = self._llm.encode(
                    rendered["prompts"],
                    rendered["params"],
                    request_id,
                    lora_request=rendered["lora_requests"],
                    priority=rendered["priorities"],
                )
                # Final outputs only: there is exactly one.
                (output,) = [output async for output in stream]
                if (meaning := finish.early(output)) is not None:
                    raise await self._early_end(meaning, request_id, output)
                return output

        return await _all(one, items)

    def _params(self, given: Mapping[str, Any]) -> Any:
        from vllm import PoolingParams

        return PoolingParams(**checked("pooling parameter", given, self._pooling))

    def _error_about(self, params: PoolParams | ScoreParams) -> Callable[[Exception], BridgeError]:
        limit = self._llm.model_config.max_model_len
        names = [*params.pooling_params, *params.tokenization_kwargs]

        def translate(error: Exception) -> BridgeError:
            ended = self._llm.output_handler.done()
            translated = diagnosis.request_error(error, limit, names, ended=ended)
            if translated.reason == "prompt_too_long":
                # Nothing is generated: all of it is for the prompt.
                translated.what = f"The prompt does not fit into `max_model_len` ({limit} tokens)."
                translated.remedy = (
                    "Shorten it, or have it cut with `tokenization_kwargs: "
                    "[truncate_prompt_tokens: -1]`."
                )
            return translated

        return translate

    def _no_scores(self) -> BridgeError:
        labels = self._llm.model_config.hf_config.num_labels
        reason = f"has {labels} classes" if self.task == "classify" else f"does `{self.task}`"
        return BridgeError(
            "unsupported",
            f"Scores are made by embedders and by classifiers of one class; this engine {reason}. "
            'Start one with `convert: "embed"`, or with a cross-encoder.',
            {"pooling_task": self.task},
        )


def pooling_fields() -> dict[str, Field]:
    """What a request may say of how it is pooled."""
    from vllm import PoolingParams

    hints = typing.get_type_hints(PoolingParams)
    return {
        field.name: Field(field.name, hints[field.name], field.default)
        for field in msgspec.structs.fields(PoolingParams)
        if field.name not in _NOT_FROM_OUTSIDE
    }


def wrong_task(task: str, engine_task: str | None, tasks: Sequence[str]) -> BridgeError:
    """The error for a task that is not the engine's, with the options of one that would do it.

    Args:
        engine_task: the engine's own pooling task; None for one that generates
        tasks: what the engine's model is fit for
    """
    if task not in CONVERSIONS:
        return invalid_value("pooling_task", task, [], list(CONVERSIONS))
    options: dict[str, Any] = {}
    if engine_task is None:
        does, options["runner"] = "generates text", "pooling"
    else:
        does = f"does `{engine_task}`"
    if task not in tasks:
        options["convert"] = CONVERSIONS[task]
    if task in tasks or task not in CONVERSIONS.values():
        options["pooler_config"] = {"task": task}
    return BridgeError(
        "unsupported",
        f"This engine {does}, and cannot do `{task}`. Start one with `{elixir.options(options)}`.",
        {"task": task, "pooling_task": engine_task, "options": options},
    )


def wrong_runner(task: str) -> BridgeError:
    """The error for a prompt to complete that came to an engine that pools."""
    return BridgeError(
        "unsupported",
        f"This engine does `{task}`, and cannot generate text. Start one with "
        '`runner: "generate"`, and without `convert`.',
        {"pooling_task": task, "options": {"runner": "generate"}},
    )


def pooling_output(output: Any) -> dict[str, Any]:
    """A *pooling output* of the protocol from vLLM's ``PoolingRequestOutput``."""
    # A score is a bare tensor, or a vector of one class.
    tensor = output.outputs.data.detach().cpu().float().contiguous()
    return {
        "request_id": output.request_id,
        "prompt_token_ids": pack_u32(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "shape": list(tensor.shape),
        # Bytes of the tensor where it lies, the last entry: so they are not copied on their way.
        "data": tensor.numpy().astype("<f4", copy=False).reshape(-1).view("u1").data,
    }


async def _all(function: Callable[..., Awaitable[T]], items: Iterable[Sequence[Any]]) -> list[T]:
    """What ``function`` makes of each of ``items``; the first exception ends the others."""
    tasks = [asyncio.ensure_future(function(*item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
