"""Makes a model of two thin layers with random weights and the tokenizer of the demo model: its
engine makes so many tokens that what is around it is what is measured.

``python two_layers.py FOLDER``, then ``MODEL=FOLDER`` for ``generate.exs``, ``deltas.exs`` and
``few_cores.exs``.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM

DEMO = Path(__file__).resolve().parents[1] / "priv" / "models" / "demo"
WEIGHTS = ("model.safetensors", "config.json")


def make(folder: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        DEMO,
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in DEMO.iterdir():
        if file.name not in WEIGHTS and not (folder / file.name).exists():
            shutil.copy(file, folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
