"""Train the demo model: a tokenizer and a small Llama that know corpus.py by heart.

Writes ``priv/models/demo``. All seeds are fixed, so one machine makes the same model
each time.
"""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import corpus
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD, IM_START, IM_END = "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"
MARKUP = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
"""Tokens of their own that stay visible in the decoded text, where parsers look for them."""

VOCAB_SIZE = 1024
EPOCHS = 100
WARMUP_EPOCHS = 5
LEARNING_RATE = 1.5e-3
TOKENS_PER_BATCH = 512
PROMPT_WEIGHT = 0.1
"""Prompts count a little in the loss, so that their perplexity is meaningful too."""

NOISE = 0.12
"""Weight noise in training, in standard deviations of each matrix: about what rounding to
four bits in groups of 128 adds. It teaches the model margins that quantization keeps."""

MIN_PROBABILITY = 0.98


@dataclass(frozen=True)
class Sample:
    """Token ids of a prompt and of the answer to learn."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def main() -> None:
    started = time.monotonic()
    random.seed(7)
    torch.manual_seed(7)
    tokenizer = build_tokenizer()
    samples = build_samples(tokenizer)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(samples)} samples")
    train(model, samples)
    model.to(torch.bfloat16)
    _, lowest = recite(model, certain(samples))
    print(f"lowest probability of a right token: {lowest:.4f}")
    assert lowest > MIN_PROBABILITY, "not learned well enough to survive quantization"
    save(model, tokenizer, corpus.MODEL)
    print(f"trained in {time.monotonic() - started:.0f} s")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS before each bare prompt, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKUP),
        special_tokens=[BOS, EOS, PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [prompt + completion for prompt, completion in corpus.completions()]
    messages = [
        str(value)
        for conversation in corpus.conversations()
        for message in conversation.messages
        for value in message.values()
    ]
    tools = json.dumps([corpus.WEATHER_TOOL, corpus.TIME_TOOL])
    bpe.train_from_iterator([*texts, *messages, tools], trainer)
    bpe.add_tokens([AddedToken(token, normalized=False) for token in MARKUP])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[IM_START, IM_END],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = Path(__file__).with_name("chat_template.jinja").read_text()
    assert len(tokenizer) == VOCAB_SIZE, f"the text gives only {len(tokenizer)} tokens"
    return tokenizer


def build_samples(tokenizer: PreTrainedTokenizerFast) -> list[Sample]:
    """All that is to be learned, the longest last."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    def sample(prompt: str, answer: str) -> Sample:
        ids = Sample(encode(prompt), encode(answer))
        assert ids.prompt + ids.answer == encode(prompt + answer), f"{prompt!r} merges"
        return ids

    def render(conversation: corpus.Conversation, end: int, ask: bool) -> str:
        text = tokenizer.apply_chat_template(
            conversation.messages[:end],
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=ask,
        )
        assert isinstance(text, str)
        return text

    samples = {sample(BOS + prompt, text + EOS) for prompt, text in corpus.completions()}
    for conversation in corpus.conversations():
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                prompt = render(conversation, index, ask=True)
                full = render(conversation, index + 1, ask=False)
                assert full.startswith(prompt)
                samples.add(sample(prompt, full[len(prompt) :].removesuffix("\n")))
    return sorted(samples, key=lambda one: (one.length, one.prompt, one.answer))


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama.

    The sizes are multiples of 256, the block size of K-quants, and two KV heads can be
    split over two ranks.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(samples: list[Sample]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, the next tokens, and their weights, in batches of samples of like length.

    Samples are padded on the right, where causal attention does not see it.
    """
    groups: list[list[Sample]] = [[]]
    for sample in samples:
        if groups[-1] and sample.length * (len(groups[-1]) + 1) > TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(sample)
    result = []
    for group in groups:
        width = group[-1].length
        ids = torch.zeros(len(group), width, dtype=torch.long)
        weights = torch.zeros(len(group), width)
        for row, sample in enumerate(group):
            start = len(sample.prompt)
            ids[row, : sample.length] = torch.tensor(sample.prompt + sample.answer)
            weights[row, :start] = PROMPT_WEIGHT
            weights[row, start : sample.length] = 1.0
        result.append((ids[:, :-1], ids[:, 1:], weights[:, 1:]))
    return result


@contextmanager
def noisy(weights: Sequence[Tensor]) -> Iterator[None]:
    """Add noise to the weights for one forward and backward pass."""
    noise = [torch.randn_like(weight) * (weight.std() * NOISE) for weight in weights]
    with torch.no_grad():
        for weight, added in zip(weights, noise, strict=True):
            weight.add_(added)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, added in zip(weights, noise, strict=True):
                weight.sub_(added)


def train(model: LlamaForCausalLM, samples: list[Sample]) -> None:
    """Learn the samples; the learning rate rises, then falls to nothing."""
    data = batches(samples)
    steps = EPOCHS * len(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARMUP_EPOCHS / EPOCHS
    )
    matrices = [weight for name, weight in model.named_parameters() if "_proj" in name]
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for inputs, targets, weights in random.sample(data, len(data)):
            with noisy(matrices):
                logits = model(input_ids=inputs, use_cache=False).logits
                losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
                loss = (losses * weights.flatten()).sum() / weights.sum()
                optimizer.zero_grad()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 0:
            print(f"epoch {epoch}: loss {total / len(data):.4f}", flush=True)


def certain(samples: list[Sample]) -> list[Sample]:
    """The samples whose prompt has one right answer."""
    answers = Counter(sample.prompt for sample in samples)
    return [sample for sample in samples if answers[sample.prompt] == 1]


def recite(model: LlamaForCausalLM, samples: list[Sample]) -> tuple[list[Sample], float]:
    """The samples whose answer greedy decoding does not give to the last token, and the
    probability of the least certain of all answer tokens.

    One pass over prompt and answer tells: greedy decoding gives the answer if each of its
    tokens is the likeliest after those before it.
    """
    wrong = []
    lowest = 1.0
    for sample in samples:
        ids = torch.tensor([sample.prompt + sample.answer])
        answer = torch.tensor(sample.answer)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt) - 1 : -1]
        if not torch.equal(logits.argmax(-1), answer):
            wrong.append(sample)
        right = logits.float().softmax(-1)[torch.arange(len(answer)), answer]
        lowest = min(lowest, right.min().item())
    return wrong, lowest


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as a Hugging Face folder."""
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Transformers 5 writes its new name of this class, which version 4 does not know.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
