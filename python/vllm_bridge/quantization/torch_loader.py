"""Has vLLM read checkpoints of ``torch.save`` that are more than a dict of tensors. Imports vLLM.

They are mapped into memory, so that a layer is read when it is loaded, and nothing is run that they
might hold (``weights_only``).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

Tensors = Callable[[Mapping[str, Any]], Iterator[tuple[str, torch.Tensor]]]


def register(load_format: str, tensors: Tensors) -> None:
    """Makes a ``load_format`` of vLLM's.

    Args:
        tensors: what there is in the contents of a file, by names of tensors
    """
    if load_format in _LOAD_FORMAT_TO_MODEL_LOADER:
        return

    class Loader(DefaultModelLoader):  # type: ignore[misc]
        def __init__(self, load_config: Any) -> None:
            super().__init__(dataclasses.replace(load_config, load_format="pt"))

        def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
            _, files, _, _ = self._prepare_weights(
                source.model_or_path, source.subfolder, source.revision, False, None
            )
            for file in files:
                contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                yield from tensors(contents)

    register_model_loader(load_format)(Loader)
