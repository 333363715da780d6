"""What is good to know of a model before it is loaded: what it is for, and which options go with
that."""

import json
import os
import re
from collections.abc import Iterator

from vllm_bridge import vllm_source
from vllm_bridge.checkpoints import families, gguf, gguf_model
from vllm_bridge.engine.finding import Finding
from vllm_bridge.engine.plan import Plan

# How templates of chats speak of what models think before they answer.
_THINKS = re.compile(r"<think|enable_thinking|reasoning_content|reasoning_effort|\[THINK\]")
_CALLS = re.compile(r"\btools\b")

# Where GGUF files have them.
_GGUF_TEMPLATES = "tokenizer.chat_template"

# What models that generate do where the options have vLLM make another model of them.
_CONVERTED = {"embed": ("embed", "encode", "score"), "classify": ("classify",)}

_MEANING = {
    "text": "It is a text model: it completes prompts and chats, and takes no images.",
    "vision": (
        "It is a vision model: prompts may have images (`multi_modal_data`), and it answers text."
    ),
    "audio": "It is a model that hears. This library gives it text, and no sound.",
    "embedding": "It is an embedding model: `VLLM.embed/3` makes vectors of texts.",
    "late interaction": (
        "It is a model of late interaction: `VLLM.encode/3` makes a vector of each token, and "
        "`VLLM.score/4` compares texts by them."
    ),
    "classifier": "It is a classifier: `VLLM.classify/3` gives the classes of texts.",
    "reranker": (
        "It is a reranker: `VLLM.score/4` and `VLLM.rerank/4` say how well texts fit a query."
    ),
    "token classifier": "It classifies tokens: `VLLM.encode/3` gives the classes of each.",
    "reward": "It is a reward model: `VLLM.encode/3` gives what it thinks of an answer.",
}


def of(plan: Plan) -> Iterator[Finding]:
    """What users should know of the model that was planned."""
    kind = family(plan)
    found = capabilities(plan)
    details = {"family": kind, "capabilities": list(found)}
    if kind == "speech" and plan.checkpoint.config:
        yield Finding(
            "warning",
            "unsupported_model",
            "It transcribes speech and does nothing else, and no function of this library takes "
            "sound.",
            details,
            "Serve it by vLLM's own server, or use Bumblebee, which runs speech recognition from "
            "Elixir.",
        )
    elif kind in _MEANING:
        yield Finding("info", "family", _MEANING[kind], details)
    if (wish := plan.isq) is not None:
        made = {"option": wish.option, "format": wish.kind.format, "type": wish.kind.word}
        yield Finding("info", "isq", wish.note, made)
    if "reasoning" in found and not plan.options.get("reasoning_parser"):
        yield _reasoning(plan)


def family(plan: Plan) -> str | None:
    """The family of the model; also of one that is refused for it."""
    refused = (finding.details.get("family") for finding in plan.findings)
    return families.of(plan.checkpoint.config, _names(plan)) or next(filter(None, refused), None)


def capabilities(plan: Plan) -> tuple[str, ...]:
    """What the model can do: ``families.capabilities``, and ``"tools"`` and ``"reasoning"`` where
    its chat template speaks of them."""
    found = families.capabilities(family(plan))
    if "generate" in found and (as_asked := _CONVERTED.get(_conversion(plan))):
        return as_asked
    if "chat" not in found:
        return found
    template = _template(plan)
    if not template:
        return tuple(name for name in found if name != "chat")
    spoken_of = (("tools", _CALLS), ("reasoning", _THINKS))
    return found + tuple(name for name, pattern in spoken_of if pattern.search(template))


def _conversion(plan: Plan) -> str:
    """What the options make of a model that generates."""
    asked = plan.options.get("convert")
    if asked in (None, "auto"):
        return "embed" if plan.options.get("runner") == "pooling" else "none"
    return str(asked)


def _reasoning(plan: Plan) -> Finding:
    parsers = list(vllm_source.table("_REASONING_PARSERS_TO_REGISTER", "reasoning"))
    model_type = _letters(str(plan.checkpoint.config.get("model_type")))
    fitting = [
        name for name in parsers if _letters(name) in model_type or model_type in _letters(name)
    ]
    if fitting:
        remedy = f'`reasoning_parser: "{max(fitting, key=len)}"` does, by its name.'
    else:
        remedy = f"vLLM has: {', '.join(parsers)}."
    return Finding(
        "info",
        "family",
        "Its chat template has it think before it answers. A reasoning parser tells its thoughts "
        "from the answer.",
        {"option": "reasoning_parser", "allowed": parsers, "nearest": fitting},
        remedy,
    )


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _template(plan: Plan) -> str:
    """The model's chat template; where there are several, all of them."""
    folder, files = plan.checkpoint.folder, plan.checkpoint.files
    elsewhere = plan.options.get("tokenizer")
    if isinstance(elsewhere, str) and os.path.isdir(elsewhere):
        folder, files = elsewhere, ()
    if folder is None or not os.path.isdir(folder):
        return ""
    if files and files[0].endswith(gguf_model.SUFFIX):
        said = gguf.read(os.path.join(folder, files[0])).metadata
        return " ".join(str(said[key]) for key in said if key.startswith(_GGUF_TEMPLATES))
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                text = file.read()
            found = text if name.endswith(".jinja") else json.loads(text).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        if found:
            return found if isinstance(found, str) else json.dumps(found)
    return ""


def _names(plan: Plan) -> frozenset[str]:
    folder = plan.checkpoint.folder
    if folder is None or not os.path.isdir(folder):
        return frozenset()
    return frozenset(os.listdir(folder))
