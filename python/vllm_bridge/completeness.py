"""Keeps a model from running with weights that its checkpoint does not have.

vLLM looks only at weights outside of linear layers, and of a quantized model at none: what is
missing of the others stays what the memory held, and the model answers nonsense. Runs in vLLM's
processes.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def install() -> None:
    """Called in every process of vLLM, possibly more than once."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = DefaultModelLoader.load_weights
    if hasattr(original, "__wrapped__") and original.__module__ == __name__:
        return

    @functools.wraps(original)
    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        of_model = model.load_weights
        loaded: list[set[str] | None] = []

        def listen(*arguments: Any, **keywords: Any) -> Any:
            names = of_model(*arguments, **keywords)
            loaded.append(None if names is None else set(names))  # vLLM adds to its own
            return names

        model.load_weights = listen
        try:
            original(self, model, model_config)
        finally:
            del model.load_weights
        check(model, loaded[-1] if loaded else None)

    load_weights.__module__ = __name__
    DefaultModelLoader.load_weights = load_weights


def check(model: Any, loaded: set[str] | None) -> None:
    """Raises a ``ValueError`` in vLLM's words.

    Weights count as missing where other layers had theirs, and biases of linear layers where their
    weights were there: some models give weights values of their own, or load them by other names.

    Args:
        loaded: the names that the model loaded; None where it does not tell
    """
    if loaded is None:
        return
    from vllm.model_executor.layers.linear import LinearBase

    kinds = {_INDEX.sub("*", name) for name in loaded}
    linear = (name for name, module in model.named_modules() if isinstance(module, LinearBase))
    biases = {f"{name}.bias" for name in linear}
    missing = sorted(
        name
        for name in _from_checkpoint(model)
        if name not in loaded
        and (
            _INDEX.sub("*", name) in kinds
            or (name in biases and name.removesuffix("bias") + "weight" in loaded)
        )
    )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            "Following weights were not initialized from checkpoint: "
            f"{', '.join(missing[:3])}{more}"
        )


def _from_checkpoint(model: Any) -> Iterator[str]:
    """The names of the parameters that only a checkpoint can give."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    exempt = set()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        # Made while loading, or with a default.
        if getattr(method, "uses_meta_device", False) or isinstance(method, BaseKVCacheMethod):
            exempt |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
    for name, parameter in model.named_parameters():
        if name not in exempt and parameter.numel() > 0:
            yield name
