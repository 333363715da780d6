"""Quantize the demo model in the ways that take the quantizing environment.

    make.py [NAME...]

writes ``test/checkpoints/NAME`` for each variant, or for those named. A folder holds
the config as the tool wrote it, and of the weights those that differ from the demo model's: the
rest, and the tokenizer, are put back where a test uses it (``python/tests/checkpoints.py``).
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

# llmcompressor and auto-round ask the hub of their own accord.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo_model"))

import corpus
import quantize
import torch
from auto_round import AutoRound
from datasets import Dataset
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import GPTQConfig
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CHECKPOINTS = corpus.ROOT / "test" / "checkpoints"

LINEAR = {"targets": "Linear", "ignore": ["lm_head"]}


def llmcompressor(modifier: Callable[[], object]) -> Callable[[Path], None]:
    """A variant that llmcompressor makes with a modifier of its own."""

    def make(folder: Path) -> None:
        oneshot(
            model=AutoModelForCausalLM.from_pretrained(corpus.MODEL, dtype=torch.bfloat16),
            tokenizer=AutoTokenizer.from_pretrained(corpus.MODEL),
            dataset=Dataset.from_list(quantize.calibration()),
            recipe=modifier(),
            num_calibration_samples=1000,
            shuffle_calibration_samples=False,
            output_dir=str(folder),
        )

    return make


def auto_round(scheme: str) -> Callable[[Path], None]:
    """A variant in groups of 128 that auto-round makes."""

    def make(folder: Path) -> None:
        length = 128
        ids = torch.tensor([id for row in quantize.calibration() for id in row["input_ids"]])
        samples = list(ids[: len(ids) // length * length].reshape(-1, 1, length))
        rounding = AutoRound(
            AutoModelForCausalLM.from_pretrained(corpus.MODEL, dtype=torch.bfloat16),
            AutoTokenizer.from_pretrained(corpus.MODEL),
            scheme=scheme,
            iters=20,
            seqlen=length,
            nsamples=len(samples),
            batch_size=4,
            dataset=samples,
            device_map="cpu",
            enable_torch_compile=False,
        )
        rounding.quantize_and_save(str(folder), format="auto_round")

    return make


def gptq(**settings: object) -> Callable[[Path], None]:
    """A variant that gptqmodel makes, of those that vLLM's own GPTQ refuses."""

    def make(folder: Path) -> None:
        config = GPTQConfig(offload_to_disk=False, act_group_aware=False, **settings)
        model = GPTQModel.load(str(corpus.MODEL), config, device="cpu")
        model.quantize(quantize.calibration(), batch_size=8, backend=BACKEND.GPTQ_TORCH)
        model.save(str(folder))

    return make


VARIANTS: dict[str, Callable[[Path], None]] = {
    "w4a16": llmcompressor(lambda: GPTQModifier(scheme="W4A16", **LINEAR)),
    "w4a16-asym": llmcompressor(lambda: QuantizationModifier(scheme="W4A16_ASYM", **LINEAR)),
    "w8a8": llmcompressor(lambda: QuantizationModifier(scheme="W8A8", **LINEAR)),
    "fp8-dynamic": llmcompressor(lambda: QuantizationModifier(scheme="FP8_DYNAMIC", **LINEAR)),
    "fp8-static": llmcompressor(lambda: QuantizationModifier(scheme="FP8", **LINEAR)),
    "auto-round": auto_round("W4A16"),
    "auto-round-w3": auto_round("W3A16"),
    "gptq-w2": gptq(bits=2, group_size=32, sym=False),
    "gptq-w3": gptq(bits=3, group_size=128, sym=True),
    "gptq-w4-act": gptq(bits=4, group_size=128, sym=True, desc_act=True),
    "gptq-w4-asym-act": gptq(bits=4, group_size=64, sym=False, desc_act=True, format="gptq_v2"),
    "gptq-w8": gptq(bits=8, group_size=-1, sym=True),
}


def make(name: str) -> None:
    random.seed(7)
    torch.manual_seed(7)
    with TemporaryDirectory() as temporary:
        VARIANTS[name](Path(temporary))
        made = sorted(Path(temporary).rglob("config.json"))[0].parent
        target = CHECKPOINTS / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        config = json.loads((made / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(differing(made), target / "model.safetensors", metadata={"format": "pt"})
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{name}: {size / 1e6:.1f} MB", flush=True)


def differing(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in the folder that the demo model does not have, or not so."""
    demo = load_file(corpus.MODEL / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in demo or demo[name].dtype != tensor.dtype or not demo[name].equal(tensor)
    }


if __name__ == "__main__":
    for variant in sys.argv[1:] or VARIANTS:
        make(variant)
