"""The model card of what is uploaded: what it is made of, how, what it lost, and how to use it."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vllm_bridge.hub import names
from vllm_bridge.registry.entry import Entry

# What a card takes over from that of its source, which stays true of what was made of it.
INHERITED: Final = ("license", "license_name", "license_link", "language")

_LIBRARIES: Final = {"gguf": "gguf"}

# Figures of `quality` with their titles, in the order of the table. Others follow by their names.
_FIGURES: Final = {
    "perplexity": "perplexity",
    "kl_mean": "mean KL divergence from the source",
    "kl_p99": "99th percentile of the KL divergence",
    "same_top": "share of tokens where the likeliest is the source's",
    "tokens_per_second": "tokens per second, where it was measured",
}


def card(entry: Entry, repository: str, inherited: Mapping[str, Any] = {}) -> str:
    """A ``README.md`` as the hub reads it.

    Args:
        repository: that it is for
        inherited: what the card of the source says of ``INHERITED``
    """
    from huggingface_hub.utils import yaml_dump

    parts = [
        f"---\n{yaml_dump(metadata(entry, inherited)).rstrip()}\n---",
        f"# {repository.rpartition('/')[2]}",
        _what(entry),
        *_how(entry.made or {}),
        *_quality(entry.quality or {}),
        _use(entry, repository),
    ]
    return "\n\n".join(parts) + "\n"


def metadata(entry: Entry, inherited: Mapping[str, Any]) -> dict[str, Any]:
    """What stands at the top of the card, for the hub."""
    told: dict[str, Any] = {}
    if (source := source_id(entry)) is not None:
        told["base_model"] = source
        if entry.kind == "adapter":
            told["base_model_relation"] = "adapter"
        elif entry.method is not None:
            told["base_model_relation"] = "quantized"
    told |= {name: inherited[name] for name in INHERITED if inherited.get(name)}
    usual = "peft" if entry.kind == "adapter" else "transformers"
    told["library_name"] = _LIBRARIES.get(entry.method or "", usual)
    told["tags"] = ["vllm", *([entry.method] if entry.method else [])]
    return told


def source_id(entry: Entry) -> str | None:
    """The model of the hub that it was made of; None where that is not known, or is a folder."""
    for given in (entry.source, entry.base_model):
        name = names.parse(given or "")
        if name is not None and "/" in name.id:
            return name.id
    return None


def commit(entry: Entry) -> str | None:
    """The commit of its source; None where that is known by a fingerprint of its files."""
    revision = entry.revision or ""
    return revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None


def _what(entry: Entry) -> str:
    kind = "A model"
    if entry.kind == "adapter":
        kind = "A LoRA adapter"
    elif entry.method is not None:
        bits = f", {entry.bits:.3g} bits" if entry.bits is not None else ""
        label = f" `{entry.label}`" if entry.label else ""
        kind = f"A quantized model:{label} ({entry.method}{bits})"
    source = source_id(entry)
    if source is None:
        return f"{kind}."
    of = "for" if entry.kind == "adapter" else "made of"
    at = f" at revision `{revision}`" if (revision := commit(entry)) else ""
    return f"{kind}, {of} [{source}](https://huggingface.co/{source}){at}."


def _how(made: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    if isinstance(at := made.get("at"), str):
        rows.append(("made on", at.partition("T")[0]))
    rows += list(_items("options", made))
    rows += list(_items("libraries", made))
    if isinstance(calibration := made.get("calibration"), dict):
        figures = [f"{calibration[key]} {key}" for key in ("texts", "tokens") if key in calibration]
        texts = "the library's own texts" if calibration.get("source") == "default" else "own texts"
        rows.append(("calibrated with", ", ".join([texts, *figures])))
    if rows:
        yield "## How it was made"
        yield _table(rows)


def _items(name: str, made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = made.get(name)
    for key, value in found.items() if isinstance(found, dict) else ():
        # Where files are on a machine is nobody else's.
        if value is not None and not (isinstance(value, str) and value.startswith(("/", "~"))):
            yield f"`{key}`", value if isinstance(value, str) else json.dumps(value)


def _quality(quality: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (title, f"{value:.4g}")
        for name, title in _FIGURES.items()
        if isinstance(value := quality.get(name), int | float)
    ]
    if rows:
        yield "## What was lost"
        yield _table(rows)
        yield "Measured on text that it was not calibrated with, against what it was made of."


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [(key, value.replace("|", "\\|").replace("\n", " ")) for key, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in cells)])


def _use(entry: Entry, repository: str) -> str:
    lines = [f'llm = VLLM.llm!("{repository}")', 'VLLM.generate!(llm, "…")']
    if entry.kind == "adapter":
        base = source_id(entry) or "BASE"
        lines = [
            f'llm = VLLM.llm!("{base}", enable_lora: true)',
            f'adapter = VLLM.lora_request!("{entry.name}", "{repository}")',
            'VLLM.generate!(llm, "…", lora_request: adapter)',
        ]
    return "\n".join(["## Use in Elixir", "", "```elixir", *lines, "```"])
