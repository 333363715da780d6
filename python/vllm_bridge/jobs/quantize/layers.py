"""Models that are quantized one linear layer after the other, from file to file, by libraries that
look at nothing but weights. No more of a model is in memory than one of its files.

The functions that need torch and transformers import them.
"""

import fnmatch
import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge import json_files, machine
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import transformers_models
from vllm_bridge.jobs.quantize.producer import Source, Tell

if TYPE_CHECKING:
    import torch

# The files of a checkpoint of several.
INDEX = "model.safetensors.index.json"

# What becomes of the weight of a layer: tensors by what their names end with, after the layer's.
Quantize = Callable[[str, "torch.Tensor"], Mapping[str, "torch.Tensor"]]

# What becomes of the tensors of a file, and what is said of them in its header.
Flatten = Callable[[dict[str, Any]], tuple[dict[str, "torch.Tensor"], dict[str, str]]]


def linear(source: Source, skipped: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The linear layers of a model whose weights can be quantized, and those that are left as they
    are: the output layer, and what ``skipped`` says, by their whole names or a part of them.
    Experts are no linear layers where the model's class has those of a block in one.

    Raises:
        BridgeError: ``unsupported_model`` where transformers does not know the model;
            ``unsupported`` where it has none
    """
    import torch

    model = transformers_models.skeleton(source)
    head = model.get_output_embeddings()
    stored = {name for name in source.checkpoint.tensors if name.endswith(".weight")}
    found: list[str] = []
    left: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or f"{name}.weight" not in stored:
            continue
        is_left = module is head or any(_is_part(one, name) for one in skipped)
        (left if is_left else found).append(name)
    if not found:
        raise BridgeError(
            "unsupported",
            f"`{source.path}` has no linear layers under the names that transformers knows them "
            "by, so that there is nothing to quantize.",
            {"model": source.path, "architecture": source.checkpoint.architecture},
            remedy="Use another format, or a model of another kind.",
        )
    return found, left


def left_out(source: Source, layers: Collection[str]) -> tuple[str, ...]:
    """What there is to say of large weights that are no linear layers, and stay as they are."""
    chosen = {f"{name}.weight" for name in layers}
    sizes = {
        name: tensor.size
        for name, tensor in source.checkpoint.tensors.items()
        if ".experts." in name and name not in chosen
    }
    if not sizes:
        return ()
    part = sum(sizes.values()) / sum(one.size for one in source.checkpoint.tensors.values())
    return (
        f"The experts, which are {part:.0%} of the model, are left as they are: they are no linear "
        "layers. GGUF and compressed-tensors have them quantized.",
    )


def _is_part(skipped: str, name: str) -> bool:
    """As transformers and vLLM read lists of modules that are left as they are."""
    return skipped == name or f".{skipped}." in f".{name}." or fnmatch.fnmatch(name, skipped)


def rewrite(
    source: Source,
    out: str,
    layers: Collection[str],
    quantize: Quantize,
    quantization_config: Mapping[str, Any],
    tell: Tell,
    flatten: Flatten = lambda tensors: (tensors, {}),
) -> None:
    """Writes the model once more, with the weights of ``layers`` as ``quantize`` makes them.

    The files are those of the source.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    files: dict[str, list[str]] = {}
    for name, tensor in source.checkpoint.tensors.items():
        files.setdefault(os.path.basename(tensor.file), []).append(name)
    chosen, done, total_size = set(layers), 0, 0
    weight_map: dict[str, str] = {}
    for file, names in sorted(files.items()):
        tensors: dict[str, Any] = {}
        with safe_open(os.path.join(source.path, file), framework="pt") as stored:
            for name in names:
                layer = name.removesuffix(".weight")
                tensor = stored.get_tensor(name)
                if layer not in chosen or layer == name:
                    tensors[name] = tensor
                    continue
                made = quantize(layer, tensor)
                tensors |= {f"{layer}.{part}": value for part, value in made.items()}
                # It would come to several times the model.
                machine.give_back()
                done += 1
                tell("layers", done, len(chosen))
        flat, said = flatten(tensors)
        flat = {name: tensor.contiguous() for name, tensor in flat.items()}
        save_file(flat, os.path.join(out, file), metadata={"format": "pt"} | said)
        weight_map |= dict.fromkeys(flat, file)
        total_size += sum(tensor.nbytes for tensor in flat.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write(os.path.join(out, INDEX), index)
    config = json_files.read(os.path.join(source.path, "config.json"))
    config["quantization_config"] = dict(quantization_config)
    _write(os.path.join(out, "config.json"), config)
    source.copy_rest(out)


def _write(path: str, value: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
