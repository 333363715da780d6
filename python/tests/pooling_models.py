"""Models to pool with: random numbers from a seed, over the demo model or alone.

    python pooling_models.py FOLDER

makes `classifier` (three classes with names), `cross-encoder` (one class) and `wide` (with
vectors of 1,024 numbers) in FOLDER.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

DEMO = Path(__file__).resolve().parents[2] / "priv" / "models" / "demo"
LABELS = ["animal", "city", "number"]


def make_classifier(folder: Path, labels: list[str]) -> Path:
    """A model that tells ``labels`` apart, at random but with conviction."""
    torch.manual_seed(7)
    model = LlamaForSequenceClassification.from_pretrained(
        DEMO,
        dtype=torch.float32,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    torch.nn.init.normal_(model.score.weight, std=0.2)
    return _save(model, folder)


def make_wide(folder: Path) -> Path:
    """One layer, which makes wide vectors of nonsense."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=8,
        dtype=torch.bfloat16,
    )
    return _save(LlamaModel(config).bfloat16(), folder)


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def make_all(folder: Path) -> None:
    make_classifier(folder / "classifier", LABELS)
    make_classifier(folder / "cross-encoder", ["relevance"])
    make_wide(folder / "wide")


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
