"""Plain models as transformers has them: without their weights, for what is asked of them before
anything starts, and what a library has written of them.
"""

import os
from collections.abc import Iterator
from typing import Any

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize.producer import Source

# What of a folder is the library's own: the weights, and what they mean. The rest, such as the
# tokenizer, is better as the source has it than as another version of transformers writes it.
_OF_LIBRARIES = ("config.json", "quantize_config.json", "model.safetensors.index.json")


def skeleton(source: Source) -> Any:
    """The model without its weights, which takes a second whatever its size.

    Raises:
        BridgeError: ``unsupported_model`` where transformers cannot make it
    """
    import torch
    import transformers

    architecture = source.checkpoint.architecture or ""
    if source.takes_more_than_text:
        raise BridgeError(
            "unsupported_model",
            f"`{source.path}` ({architecture}) takes pictures or sound, too. Of such a model "
            "only the part that reads and writes text is made, and only in GGUF.",
            {"model": source.path, "architecture": architecture},
            remedy="Use GGUF, or a model of text alone.",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source.path)
        kind = getattr(transformers, architecture, None)
        with torch.device("meta"):
            if kind is not None:
                return kind(config)
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of its own making for each config
        raise BridgeError(
            "unsupported_model",
            f"transformers {transformers.__version__}, by which layers are found, does not make "
            f"`{architecture or source.path}`: {error}",
            {"model": source.path, "architecture": architecture},
            remedy="Use a format that does without it (GGUF), or a model that it knows.",
        ) from error


def linear_layers(model: Any) -> Iterator[tuple[str, int, int]]:
    """The linear layers of a model: names, inputs and outputs."""
    import torch

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            yield name, layer.in_features, layer.out_features


def put_together(source: Source, out: str) -> None:
    """Leaves of what a library has written the weights and what they mean, and adds the rest from
    the source."""
    for name in os.listdir(out):
        if name not in _OF_LIBRARIES and not name.endswith(".safetensors"):
            os.remove(os.path.join(out, name))
    source.copy_rest(out)


def no_groups(source: Source, layer: str, inputs: int, group_size: int) -> BridgeError:
    """For a group size that does not divide the inputs of a layer."""
    sizes = [size for size in (256, 128, 64, 32, 16) if inputs % size == 0 and size != group_size]
    some = f"Choose `group_size` {' or '.join(map(str, sizes))}, or -1" if sizes else "Choose -1"
    return BridgeError(
        "unsupported",
        f"`{layer}` of `{source.path}` has {inputs} inputs, which are no whole groups of "
        f"{group_size}.",
        {"layer": layer, "inputs": inputs, "group_size": group_size},
        remedy=f"{some} for one group in each row.",
    )
