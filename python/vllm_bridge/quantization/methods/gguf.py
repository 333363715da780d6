"""GGUF, the format of llama.cpp's files."""

from typing import TYPE_CHECKING, Any

from vllm_bridge.quantization.method import Extra, Method

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint


class GGUF(Method):
    name = "gguf"
    extra = Extra("gguf", {"gguf": "gguf"}, faster={"ggml-python": "ggml"})
    note = "weights stay as packed as the file has them; with ggml llama.cpp's own kernels compute"
    needs_checkpoint = True
    load_format = "gguf"

    def prepare(self, checkpoint: "Checkpoint", arguments: dict[str, Any]) -> str | None:
        from vllm_bridge.quantization.gguf.unfold import unfold

        return unfold(checkpoint, arguments)
