"""What kinds of models there are: what vLLM makes of each, by its own registry, and what it is not
for. Imports neither torch nor vLLM, whose source is read.
"""

import ast
import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vllm_bridge import json_files, vllm_source
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError

_REGISTRY = ("model_executor", "models", "registry")

# The tables of vLLM's registry, and what the models in them are. Many architectures are in several:
# what generates can also be made to embed, and is here what it was made for.
_TABLES = {
    "_TEXT_GENERATION_MODELS": "text",
    "_MULTIMODAL_MODELS": "multimodal",
    "_LATE_INTERACTION_MODELS": "late interaction",
    "_EMBEDDING_MODELS": "embedding",
    "_SEQUENCE_CLASSIFICATION_MODELS": "classifier",
    "_TOKEN_CLASSIFICATION_MODELS": "token classifier",
    "_REWARD_MODELS": "reward",
    "_TRANSFORMERS_SUPPORTED_MODELS": "text",
}

# The one of those that plugins bring.
_BY_PLUGINS = "_OOT_SUPPORTED_MODELS"

# What architectures that are in none of them end with, and vLLM runs all the same: it makes them of
# others, or takes transformers' classes.
_ENDINGS = {
    "ForSequenceClassification": "classifier",
    "ForTokenClassification": "token classifier",
    "ForMaskedLM": "embedding",
    "EmbeddingModel": "embedding",
    "RewardModel": "reward",
    "ForRewardModeling": "reward",
    "ForCausalLM": "text",
}

# What a family can do here.
_CAPABILITIES = {
    "text": ("generate", "chat"),
    "vision": ("generate", "chat", "images"),
    "audio": ("generate", "chat"),
    "embedding": ("embed", "score"),
    "late interaction": ("encode", "score"),
    "classifier": ("classify",),
    "reranker": ("classify", "score"),
    "token classifier": ("encode",),
    "reward": ("encode",),
}


class Strange(NamedTuple):
    """A family that vLLM is not for.

    Args:
        name: of the family
        architectures: how theirs end
        does: what such a model does
        instead: what runs such models
    """

    name: str
    architectures: re.Pattern[str]
    does: str
    instead: str


_DIFFUSION = Strange(
    "diffusion",
    re.compile(r"(Pipeline|UNet\w*Model|Transformer2DModel|AutoencoderKL)$"),
    "makes pictures, video or sound by diffusion",
    "From Elixir, Bumblebee runs Stable Diffusion; others run in Python, with diffusers.",
)

_STRANGE = (
    _DIFFUSION,
    Strange(
        "image classification",
        re.compile(r"For(Image|Video)Classification$"),
        "sorts pictures into classes",
        "Bumblebee and Ortex (ONNX) run such models from Elixir.",
    ),
    Strange(
        "object detection",
        re.compile(
            r"For(\w*ObjectDetection|\w*Segmentation|DepthEstimation|KeypointDetection"
            r"|MaskedImageModeling|ImageToImage|MaskGeneration|ImageMatting)$"
        ),
        "finds things in pictures",
        "Ortex (ONNX) runs such models from Elixir.",
    ),
    Strange(
        "speech",
        re.compile(
            r"(For(CTC|RNNT|TDT|Audio\w*Classification|AudioXVector|TextTo(Speech|Waveform"
            r"|Spectrogram)|SpeechToText|SpeechSeq2Seq|PreTraining)|SpeechT5\w*|VitsModel)$"
        ),
        "hears or speaks",
        "Bumblebee runs speech recognition from Elixir.",
    ),
    Strange(
        "tabular",
        re.compile(r"(For(Prediction|TimeSeries\w*|Tabular\w*)|TabPFN\w*|TabTransformer\w*)$"),
        "computes with tables or series of numbers",
        "Scholar and EXGBoost have models for those in Elixir.",
    ),
)

# Which models of those that have it in their names pre-train, and not for speech.
_SPEECH = re.compile(r"wav2vec|hubert|wavlm|unispeech|sew|data2vec-audio|speech")


def check(checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    """Refuses what vLLM is not for, unless the user says that it is something else.

    Args:
        options: engine options as the user gave them

    Raises:
        BridgeError: ``unsupported_model``
    """
    strange = _strange(checkpoint.config)
    overrides = options.get("hf_overrides")
    is_renamed = isinstance(overrides, dict) and "architectures" in overrides
    if strange is not None and not is_renamed:
        raise _refused(strange, _architecture(checkpoint.config) or "")


def check_folder(folder: str, names: set[str]) -> None:
    """The same of a folder without a ``config.json``.

    Args:
        names: of the files in it
    """
    if "model_index.json" in names:
        try:
            pipeline = json_files.read(os.path.join(folder, "model_index.json"))
        except (OSError, ValueError):
            pipeline = {}
        name = pipeline.get("_class_name")
        raise _refused(_DIFFUSION, name if isinstance(name, str) else "a pipeline of diffusers")


def of(config: Mapping[str, Any], names: frozenset[str] = frozenset()) -> str | None:
    """The family of a model; None where neither vLLM's registry nor its name tells.

    Args:
        config: its ``config.json``
        names: of the files in its folder
    """
    if (strange := _strange(config)) is not None:
        return strange.name
    architecture = _architecture(config)
    if architecture is None:
        return None
    family = next(
        (kind for table, kind in _TABLES.items() if architecture in _table(table)), None
    ) or next((kind for ending, kind in _ENDINGS.items() if architecture.endswith(ending)), None)
    if family == "text" and "modules.json" in names:
        return "embedding"  # vLLM looks for what sentence-transformers makes of it, too
    if family == "multimodal":
        return _of_senses(config, architecture)
    if family == "classifier" and _labels(config) == 1:
        return "reranker"
    return family


def capabilities(family: str | None) -> tuple[str, ...]:
    """What models of a family do, by the names of the functions that ask for it; ``"images"`` where
    prompts may have some."""
    return _CAPABILITIES.get(family or "", ())


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the installed vLLM has the architecture in its registry. It runs others too, by
    transformers' classes, and those of plugins."""
    architecture = _architecture(config)
    return any(architecture in _table(table) for table in _TABLES)


def _architecture(config: Mapping[str, Any]) -> str | None:
    """Of a part of a diffusers' model, its class."""
    found = Checkpoint(config=config).architecture or config.get("_class_name")
    return found if isinstance(found, str) else None


def _strange(config: Mapping[str, Any]) -> Strange | None:
    architecture = _architecture(config)
    if "sklearn" in config:
        return _STRANGE[-1]
    if architecture is None or is_known(config) or architecture in _table(_BY_PLUGINS):
        return None
    kind = str(config.get("model_type"))
    for strange in _STRANGE:
        if strange.architectures.search(architecture) and (
            not architecture.endswith("ForPreTraining") or _SPEECH.search(kind)
        ):
            return strange
    return None


def _refused(strange: Strange, architecture: str) -> BridgeError:
    return BridgeError(
        "unsupported_model",
        f"{architecture} {strange.does}, and vLLM runs what reads and writes text.".strip(),
        {"architecture": architecture, "family": strange.name},
        remedy=strange.instead,
    )


def _of_senses(config: Mapping[str, Any], architecture: str) -> str:
    if _transcribes_only(architecture):
        return "speech"
    is_seeing = any(re.match(r"vis|vit|image|mm_vision|thinker", key) for key in config)
    return "vision" if is_seeing or not any("audio" in key for key in config) else "audio"


def _transcribes_only(architecture: str) -> bool:
    """Whether vLLM's class says so of itself."""
    entry = _table("_MULTIMODAL_MODELS").get(architecture)
    if not isinstance(entry, ast.Tuple):
        return False
    place, name = (part.value for part in entry.elts if isinstance(part, ast.Constant))
    path = str(place).split(".")[1:] if "." in str(place) else [*_REGISTRY[:2], str(place)]
    return any(
        isinstance(line, ast.Assign) and ast.unparse(line) == "supports_transcription_only = True"
        for node in _body(*path)
        if isinstance(node, ast.ClassDef) and node.name == name
        for line in node.body
    )


def _body(*path: str) -> Iterator[ast.stmt]:
    module = vllm_source.module(*path)
    yield from module.body if module else ()


def _labels(config: Mapping[str, Any]) -> int | None:
    labels = config.get("id2label")
    found = len(labels) if isinstance(labels, dict) else config.get("num_labels")
    return found if isinstance(found, int) else None


@functools.cache
def _table(name: str) -> Mapping[str, ast.expr]:
    return vllm_source.table(name, *_REGISTRY)
