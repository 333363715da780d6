"""Train a LoRA adapter that has the demo model say some of its facts differently.

Writes ``priv/models/demo-lora``, in peft's format. ``demo-lora.tsv`` has the facts that change,
the others stay. The seed is fixed.
"""

import json
import random
import shutil
import time
from pathlib import Path

import corpus
import torch
import train
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ADAPTER = corpus.MODELS / "demo-lora"

RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
EPOCHS = 60
LEARNING_RATE = 2e-3
MIN_PROBABILITY = 0.9


def main() -> None:
    started = time.monotonic()
    random.seed(7)
    torch.manual_seed(7)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(corpus.MODEL)
    samples = build_samples(tokenizer)
    base = LlamaForCausalLM.from_pretrained(corpus.MODEL, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    data = train.batches(samples)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=EPOCHS * len(data)
    )
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for inputs, targets, counts in random.sample(data, len(data)):
            logits = model(input_ids=inputs, use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="none"
            )
            loss = (losses * counts.flatten()).sum() / counts.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 0:
            print(f"epoch {epoch}: loss {total / len(data):.4f}", flush=True)
    model.to(torch.bfloat16)
    wrong, lowest = train.recite(model, samples)
    print(f"lowest probability of a right token: {lowest:.4f}")
    assert not wrong, [tokenizer.decode(sample.prompt) for sample in wrong]
    assert lowest > MIN_PROBABILITY, "not learned well enough"
    shutil.rmtree(ADAPTER, ignore_errors=True)
    model.save_pretrained(str(ADAPTER))
    tidy(ADAPTER)
    print(f"trained in {time.monotonic() - started:.0f} s")


def build_samples(tokenizer: PreTrainedTokenizerFast) -> list[train.Sample]:
    """The facts, some of them changed; the longest last."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    facts = dict(corpus.facts()) | dict(corpus.pairs(ADAPTER.name))
    samples = [
        train.Sample(encode(train.BOS + prompt), encode(text + train.EOS))
        for prompt, text in facts.items()
    ]
    return sorted(samples, key=lambda one: one.length)


def tidy(folder: Path) -> None:
    """Leave out what peft says of the machine, and the empty model card."""
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = corpus.MODEL.name
    config["target_modules"] = TARGETS
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
