"""What a model answers by itself: the base, before it is trained, and with the adapter."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

# So many tokens of an answer are looked at.
TOKENS: Final = 24

# What the base is asked where the user gives no prompts of their own: about things that a
# fine-tuning is seldom about.
PROBES: Final = (
    "The capital of Japan is",
    "The opposite of hot is",
    "Two plus two is",
    "Water is made of hydrogen and",
    "The first month of the year is",
    "The sun rises in the",
    "A dog is an animal that",
    "Once upon a time there was",
)


class Answer(NamedTuple):
    """What the base says after a prompt.

    Args:
        prompt: its tokens
        tokens: of the answer, the most likely one each time, with the one that ends it
    """

    prompt: list[int]
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Kept:
    """How much of the base's own answers a trained model still gives.

    Args:
        prompts: how many were asked
        same: for how many the answer is the same
        same_tokens: the share of the tokens of the base's answers that are still the most likely
        kl: the mean KL divergence of the next token's distributions along the base's answers, in
            nats
        changes: prompts whose answers changed, with both answers
    """

    prompts: int
    same: int
    same_tokens: float
    kl: float
    changes: list[dict[str, str]]

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    tell: Callable[[int], None] = lambda _done: None,
) -> list[Answer]:
    """The answers of a model, one after the other: batches would be filled up, which not every
    model bears without a trace.

    Args:
        ends: the tokens that end an answer
        tell: told how many there are already
    """
    import torch

    answers = []
    model.eval()
    with torch.inference_mode():
        for done, prompt in enumerate(prompts):
            tell(done)
            tokens = torch.tensor([prompt], device=model.device)
            found = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=TOKENS,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=ends[0],
                eos_token_id=list(ends),
            )[0, len(prompt) :].tolist()
            answers.append(Answer(prompt, found))
    return answers


def compare(model: Any, answers: Sequence[Answer], tokenizer: Any, ends: Sequence[int]) -> Kept:
    """
    Args:
        model: of peft; its base is what it is without its adapter
        answers: of the base
    """
    import torch

    same = tokens = same_tokens = 0
    divergence = 0.0
    changes = []
    model.eval()
    for answer in answers:
        row = torch.tensor([answer.prompt + answer.tokens], device=model.device)
        with torch.inference_mode():
            after = _distributions(model, row, len(answer.prompt))
            with model.disable_adapter():
                before = _distributions(model, row, len(answer.prompt))
        kept = int((after.argmax(-1) == before.argmax(-1)).sum())
        divergence += float((before.exp() * (before - after)).sum())
        tokens += len(answer.tokens)
        same_tokens += kept
        if kept == len(answer.tokens):
            same += 1
        else:
            now = generate(model, [answer.prompt], ends)[0]
            changes.append(
                {
                    "prompt": tokenizer.decode(answer.prompt, skip_special_tokens=True),
                    "before": tokenizer.decode(answer.tokens, skip_special_tokens=True),
                    "after": tokenizer.decode(now.tokens, skip_special_tokens=True),
                }
            )
    return Kept(
        prompts=len(answers),
        same=same,
        same_tokens=same_tokens / tokens,
        kl=divergence / tokens,
        changes=changes,
    )


def _distributions(model: Any, row: Any, prompt: int) -> Any:
    """Log-probabilities of each token of an answer's place, float32."""
    logits = model(input_ids=row, use_cache=False).logits[0, prompt - 1 : -1]
    return logits.float().log_softmax(-1)
