"""Check that the demo model and its quantized variants say every sentence by heart."""

import sys

import corpus
import torch
import train
from gptqmodel import GPTQModel
from quantize import VARIANTS
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast


def load(name: str) -> LlamaForCausalLM:
    """The model in the folder of that name."""
    folder = str(corpus.MODELS / name)
    if name not in VARIANTS:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    _, backend = VARIANTS[name]
    return GPTQModel.load(folder, device="cpu", backend=backend).model


def main() -> int:
    failed = False
    for name in [corpus.MODEL.name, *VARIANTS]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(corpus.MODELS / name)
        samples = train.certain(train.build_samples(tokenizer))
        wrong, lowest = train.recite(load(name), samples)
        right = len(samples) - len(wrong)
        print(f"{name}: {right} of {len(samples)} right, lowest probability {lowest:.4f}")
        for sample in wrong:
            print(f"  wrong after {tokenizer.decode(sample.prompt)!r}")
        failed = failed or bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
