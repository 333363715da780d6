"""vLLM's config of an engine that was planned, with all that is found out on the way to it."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vllm_bridge import defaults, generation_config, quantization
from vllm_bridge.checkpoints import fit
from vllm_bridge.engine import nodes
from vllm_bridge.engine.plan import BESIDE, Plan
from vllm_bridge.params import engine_options
from vllm_bridge.quantization import kv_cache, naming, online, preflight, registry


class Config(NamedTuple):
    """What an engine is made of.

    Args:
        vllm_config: vLLM's
        arguments: of the engine, by vLLM's names, that it was made from
        kernel: the name of the one that computes quantized layers; None for a plain model
        settings: what ``online.take_settings`` returned
    """

    vllm_config: Any
    arguments: Mapping[str, Any]
    kernel: str | None
    settings: str | None


def configure(plan: Plan) -> Config:
    """The config of an engine that can run, as far as can be known without weights. Imports vLLM,
    and sets variables of the environment that are for the life of a worker.

    Raises:
        BridgeError: with the reason why it cannot run
    """
    options = dict(plan.options)
    settings = None
    if plan.checkpoint.quantization is None:
        settings = online.take_settings(plan.checkpoint, options)
    elif (found := plan.checkpoint.found) is not None:
        # vLLM takes it for what config.json says.
        overrides = options.get("hf_overrides") or {}
        if isinstance(overrides, dict):
            options["hf_overrides"] = {"quantization_config": dict(found)} | overrides
    unknown_dtype = kv_cache.take_dtype(options)
    arguments = engine_options(options)
    naming.check(plan.checkpoint, arguments)
    checkpoint = quantization.as_loaded(plan.checkpoint)
    if plan.isq is None:
        fit.check_device_memory(checkpoint, arguments)
    generation_config.check(checkpoint.folder, arguments)
    nodes.meet(arguments)
    defaults.before_config(arguments)
    with offline(plan):
        model = _prepared(plan, arguments)
        online.check_settings(checkpoint, arguments)
        config, kernel = preflight.engine_config(model, checkpoint, arguments, unknown_dtype)
        if checkpoint.folder is None:
            generation_config.check_downloaded(config.model_config)
        defaults.after_config(config, arguments, checkpoint)
    return Config(config, arguments, kernel, settings)


def _prepared(plan: Plan, arguments: dict[str, Any]) -> str:
    """The model that vLLM is given; what others see keeps the name that the user gave it."""
    method = registry.meant_by(plan.checkpoint.quant_method or "")
    folder = method.prepare(plan.checkpoint, arguments)
    if folder is None and not os.path.exists(plan.model):
        folder = plan.checkpoint.folder  # of a model that was named by its name on the hub
    if folder is None:
        return plan.model
    arguments.setdefault("served_model_name", plan.model)
    return folder


@contextlib.contextmanager
def offline(plan: Plan) -> Iterator[None]:
    """Keeps a model of a local folder from being looked up on the hub while it is loaded, unless a
    part of it is there.

    Without it, transformers and vLLM ask the hub for files of the folder's name, which takes
    seconds where there is no network. vLLM's processes inherit it. What is loaded later, an
    adapter from the hub, is not touched.
    """
    if (
        plan.checkpoint.folder is None
        or "HF_HUB_OFFLINE" in os.environ
        or not all(map(os.path.exists, _beside(plan)))
    ):
        yield
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        del os.environ["HF_HUB_OFFLINE"]


def _beside(plan: Plan) -> Iterator[str]:
    """The folders and names on the hub that vLLM looks for parts of the model at."""
    draft = plan.options.get("speculative_config")
    code = plan.checkpoint.config.get("auto_map")
    given = [plan.options.get(name) for name in BESIDE]
    given += [draft.get("model"), draft.get("tokenizer")] if isinstance(draft, dict) else []
    yield from (one for one in given if isinstance(one, str))
    if plan.options.get("trust_remote_code") and isinstance(code, dict):
        # Code of another repository: "org/name--modeling.Model"
        names = [one.partition("--") for one in code.values() if isinstance(one, str)]
        yield from (repository for repository, found, _ in names if found)
