"""From a folder of Hugging Face's to a GGUF file, by llama.cpp's own converter.

The converter is no package. auto-round ships one that goes with the gguf-py beside it, and that is
the one used here.
"""

import ast
import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize.llama_cpp import pre_tokenizer, quantizer

# Of what is written: bytes, and of how many.
Told = Callable[[int, int], None]

# The types of files that it writes, by llama.cpp's names of them. "auto" is the 16-bit type that
# loses least of the source.
OUTTYPES: Final[Mapping[str, str]] = {
    "auto": "GUESSED", "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16",
}  # fmt: skip


def libraries() -> dict[str, str]:
    """What converts."""
    return {"auto-round": version("auto-round"), "gguf": version("gguf")}


@functools.cache
def architectures() -> tuple[str, ...]:
    """The architectures that it knows, by the names in ``config.json``. Its source is read, because
    an import takes seconds."""
    source = Path(_root(), "conversion", "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TEXT_MODEL_MAP":
            return tuple(ast.literal_eval(node.value or "()"))
    return ()


def check(folder: str, config: Mapping[str, Any]) -> None:
    """Refuses an architecture that the converter lacks.

    Raises:
        BridgeError: ``unsupported``
    """
    text = config.get("text_config") or {}
    names = text.get("architectures") or config.get("architectures") or [None]
    if names[0] not in architectures():
        raise BridgeError(
            "unsupported",
            f"llama.cpp's converter does not know the architecture {names[0]} of `{folder}`.",
            {"model": folder, "architecture": names[0], "allowed": list(architectures())},
            remedy="Choose another format than GGUF for this model.",
        )


def convert(folder: str, outtype: str, file: str, told: Told) -> list[str]:
    """Writes a model into a GGUF file.

    Args:
        outtype: one of ``OUTTYPES``
        told: called for each tensor

    Returns:
        what users should know of it, in sentences

    Raises:
        BridgeError: ``unsupported`` for a model that cannot be converted, with the reason
    """
    conversion = _import()
    gguf_py: Any = sys.modules["gguf"]
    base: Any = conversion.base
    notes: list[str] = []
    with _tokenizers(base, Path(folder), notes):
        hparams = base.ModelBase.load_hparams(Path(folder), False)
        name = base.get_model_architecture(hparams, base.ModelType.TEXT)
        model = conversion.get_model_class(name)(
            Path(folder), gguf_py.LlamaFileType[OUTTYPES[outtype]], Path(file)
        )
        # What `write` does, in the order of its steps: nothing is written before all is known.
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
    writer = model.gguf_writer
    (said,) = writer.kv_data
    if _begins_otherwise(said, folder):
        writer.add_add_bos_token(False)
    notes += _left_out(hparams, said)
    writer.write_header_to_file(path=Path(file))
    writer.write_kv_data_to_file()
    _follow(writer, told)
    with quantizer.writing(file):
        writer.write_tensors_to_file()
        writer.close()
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    return notes


def _begins_otherwise(said: Mapping[str, Any], folder: str) -> bool:
    """Whether texts begin with BOS in llama.cpp, which it takes for granted with SentencePiece
    where a file says nothing, and do not in the model that the file is of."""
    from transformers import AutoTokenizer

    if said["tokenizer.ggml.model"].value != "llama" or "tokenizer.ggml.add_bos_token" in said:
        return False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(tokenizer("a")["input_ids"][:1]) != [tokenizer.bos_token_id]


def _left_out(hparams: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    """What a model has and the file cannot say of it, in sentences."""
    window = hparams.get("sliding_window")
    architecture = said["general.architecture"].value
    is_said = f"{architecture}.attention.sliding_window" in said
    if not window or not hparams.get("use_sliding_window", True) or is_said:
        return []
    return [
        f"The model looks back {window} tokens, and llama.cpp has no such window for models of its "
        f"kind: what follows more than {window} tokens is not what the model would say."
    ]


def _root() -> str:
    spec = find_spec("auto_round")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'auto_round'", name="auto_round")
    return os.path.join(spec.submodule_search_locations[0], "export", "export_to_gguf")


def _import() -> Any:
    """The package `conversion`, without auto-round, whose import takes long."""
    if (root := _root()) not in sys.path:
        sys.path.append(root)
    return importlib.import_module("conversion")


def _follow(writer: Any, told: Told) -> None:
    """Has the writer tell of each tensor that it has written."""
    tensors = [one for part in writer.tensors for one in part.values()]
    total = sum(one.nbytes for one in tensors)
    done = 0

    class Followed:
        def __init__(self, tensor: Any) -> None:
            self.nbytes = tensor.nbytes
            self._tensor = tensor

        def tofile(self, file: Any) -> None:
            nonlocal done
            self._tensor.tofile(file)
            done += self.nbytes
            told(done, total)

    for one in tensors:
        one.tensor = Followed(one.tensor)


@contextlib.contextmanager
def _tokenizers(base: Any, folder: Path, notes: list[str]) -> Iterator[None]:
    """Lets the converter see tokenizers as they are, and know those that it does not.

    transformers chooses the class of a tokenizer by the kind of the model, and a class may bring a
    way of its own to cut texts; vLLM's and this library's is what stands in ``tokenizer.json``.
    """
    import transformers

    known_to_it = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(known_to_it(self, tokenizer))
        except NotImplementedError:  # its word for tokenizers that it does not know
            found = pre_tokenizer.find(folder)
            notes.append(
                "llama.cpp's converter does not know this tokenizer; it cuts texts as those do "
                f"that llama.cpp calls `{found}`, and that is what the file says."
            )
            return found

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre
    automatic = transformers.AutoTokenizer
    if (folder / "tokenizer.json").is_file():
        transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast
    try:
        yield
    finally:
        base.TextModel.get_vocab_base_pre = known_to_it
        transformers.AutoTokenizer = automatic
