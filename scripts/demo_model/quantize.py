"""Quantize the demo model to 4 bits with AWQ and with GPTQ.

Writes ``priv/models/demo-awq`` and ``priv/models/demo-gptq`` in these methods' standard
checkpoint formats. Embeddings and lm_head stay as they are. The calibration text is the
text the model knows.
"""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

# gptqmodel reads it on import; by default it starts a worker for each core and more.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import corpus
import train
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import AWQConfig, GPTQConfig
from transformers import PreTrainedTokenizerFast

GROUP_SIZE = 128
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
COPIED_FILES = [*TOKENIZER_FILES, "generation_config.json"]
CHECKPOINT_FILES = ["config.json", "quantize_config.json", "model.safetensors"]

VARIANTS = {
    # The kernels that AWQ would choose by itself need CUDA.
    "demo-awq": (
        AWQConfig(bits=4, group_size=GROUP_SIZE, sym=False, offload_to_disk=False),
        BACKEND.AWQ_TORCH,
    ),
    "demo-gptq": (
        GPTQConfig(bits=4, group_size=GROUP_SIZE, sym=True, desc_act=False, offload_to_disk=False),
        BACKEND.GPTQ_TORCH,
    ),
}
"""Folder name: how to quantize, and the kernels that run the result on a CPU."""


def calibration() -> list[dict[str, list[int]]]:
    """The training samples, as token ids."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(corpus.MODEL)
    ids = [[*sample.prompt, *sample.answer] for sample in train.build_samples(tokenizer)]
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]


def quantize(name: str) -> None:
    """Make one variant."""
    config, backend = VARIANTS[name]
    model = GPTQModel.load(str(corpus.MODEL), config, device="cpu")
    model.quantize(calibration(), batch_size=8, backend=backend)
    folder = corpus.MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with TemporaryDirectory() as saved:
        model.save(saved)
        for file in CHECKPOINT_FILES:
            shutil.copyfile(Path(saved) / file, folder / file)
    for file in COPIED_FILES:
        shutil.copyfile(corpus.MODEL / file, folder / file)


if __name__ == "__main__":
    for variant in VARIANTS:
        quantize(variant)
