"""GGUF, the format of llama.cpp's files."""

from vllm_bridge.quantization.method import Extra, Method


class GGUF(Method):
    name = "gguf"
    extra = Extra("gguf", {"gguf": "gguf"}, faster={"ggml-python": "ggml"})
    note = "weights stay as packed as the file has them; with ggml llama.cpp's own kernels compute"
    needs_checkpoint = True
    load_format = "gguf"
