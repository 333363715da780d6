"""A GGUF file as the folder that vLLM and Hugging Face's libraries take for a model."""

import json
import os
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from vllm_bridge.checkpoints import gguf
from vllm_bridge.quantization.gguf import tokenizer

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

# The config that lies beside a tokenizer. By the type of some models, such as Qwen2, Hugging Face's
# library puts a class of its own in the place of their tokenizers, which cuts texts by other rules;
# those beside a Llama it takes as they are. Without a config vLLM looks for one for two seconds.
_BESIDE_TOKENIZER: Final = {"model_type": "llama"}


def unfold(
    checkpoint: "Checkpoint", arguments: dict[str, Any], settings: Mapping[str, Any] | None = None
) -> str:
    """Writes the folder of a checkpoint: its config, its tokenizer, how its answers end, and links
    to the files of its weights. It is among the temporary files of this process, which whoever
    started the process removes: the guard does, when the worker ends.

    Args:
        arguments: of the engine, by vLLM's names. A ``tokenizer`` among them takes the place of
            the file's, which otherwise becomes it; a ``hf_config_path`` that of the file's config,
            and of nothing else.
        settings: of the user, for the config of the quantization

    Raises:
        BridgeError: ``unsupported`` or ``invalid_checkpoint``, for its tokenizer
    """
    file = gguf.read(os.path.join(checkpoint.folder or "", checkpoint.files[0]))
    config = dict(checkpoint.config)
    config["quantization_config"] = {**config["quantization_config"], **(settings or {})}
    contents = {
        "config.json": json.dumps(config),
        "generation_config.json": json.dumps(tokenizer.generation_config(file.metadata)),
    }
    own = None
    if not (arguments.get("tokenizer") or arguments.get("skip_tokenizer_init")):
        own = tokenizer.files(file.path, file.metadata)
    folder = tempfile.mkdtemp(prefix="gguf-")
    _write(folder, contents)
    for path in file.parts:
        os.symlink(os.path.abspath(path), os.path.join(folder, os.path.basename(path)))
    if own is not None:
        arguments["tokenizer"] = os.path.join(folder, "tokenizer")
        os.mkdir(arguments["tokenizer"])
        _write(
            arguments["tokenizer"],
            {
                "config.json": json.dumps(_BESIDE_TOKENIZER),
                "tokenizer.json": own.tokenizer,
                "tokenizer_config.json": json.dumps(own.config),
            },
        )
    if arguments.get("hf_config_path"):
        arguments["quantization"] = "gguf"
        arguments.setdefault("generation_config", folder)
    return folder


def _write(folder: str, contents: Mapping[str, str]) -> None:
    for name, content in contents.items():
        with open(os.path.join(folder, name), "x", encoding="utf-8") as file:
            file.write(content)
