"""vLLM's loaders read the files, and of each the tensors, that ``checkpoints.files`` names.

They read every file that matches, and a tensor that two files hold from the one that comes last.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm_bridge.checkpoints import files
from vllm_bridge.patches import replace

SEEN = ("0.32.",)

_FILTER = "filter_duplicate_safetensors_files"

# Where they come from, and who has them under names of its own. Plugins, which import them too, are
# loaded after this one: it comes from PYTHONPATH.
TOUCHES = {
    "vllm.model_executor.model_loader.weight_utils": (
        "filter_duplicate_safetensors_files",
        "safetensors_weights_iterator",
        "multi_thread_safetensors_weights_iterator",
        "fastsafetensors_weights_iterator",
        "instanttensor_weights_iterator",
    ),
    "vllm.model_executor.model_loader.default_loader": (
        "filter_duplicate_safetensors_files",
        "safetensors_weights_iterator",
        "multi_thread_safetensors_weights_iterator",
        "fastsafetensors_weights_iterator",
        "instanttensor_weights_iterator",
    ),
}


def apply() -> None:
    for module, names in TOUCHES.items():
        owner = importlib.import_module(module)
        for name in names:
            replace(owner, name, of_the_model if name == _FILTER else without_strays)


def of_the_model(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @functools.wraps(original)
    def filter_files(paths: list[str], folder: str, index_file: str) -> list[str]:
        form = "mistral" if index_file == files.INDEXES["mistral"] else "hf"
        wanted = files.weight_files(folder, map(os.path.basename, paths), form)
        paths = [path for path in paths if os.path.basename(path) in wanted]
        return original(paths, folder, index_file)

    return filter_files


def without_strays(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(original)
    def iterator(paths: Sequence[str], *args: Any, **keywords: Any) -> Iterator[Any]:
        strays = files.strays(paths)
        yield from original([path for path in paths if path not in strays], *args, **keywords)
        for path, names in strays.items():
            for name, tensor in original([path], *args, **keywords):
                if name not in names:
                    yield name, tensor

    return iterator
