"""Training a LoRA adapter with peft and transformers' Trainer, so that it can be killed at any
moment and go on with the same result."""

import json
import math
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.finetune import answers, base, checkpoints, data, estimate
from vllm_bridge.jobs.finetune.checkpoints import written
from vllm_bridge.jobs.finetune.data import Example, Record
from vllm_bridge.jobs.finetune.options import Settings
from vllm_bridge.jobs.finetune.plan import Plan
from vllm_bridge.jobs.task import Telling

# What peft writes of an adapter.
ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")


def train(
    plan: Plan, out: Path, states: Path, tell: Telling, name: str | None = None
) -> dict[str, Any]:
    """Trains the adapter and writes it.

    Args:
        out: the folder that it is written into
        states: where the training's states are kept; an earlier run's are gone on from
        tell: told how far it is; see ``jobs.task``
        name: what the adapter calls its base; by default as the plan does
    """
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import set_seed

    started = time.monotonic()
    settings, seed = plan.settings, plan.settings.training["seed"]
    states.mkdir(parents=True, exist_ok=True)
    tokenizer = plan.tokenizer
    examples, held_out = list(plan.train), plan.held_out
    tell("loading")
    set_seed(seed)
    model = base.load(plan.checkpoint, settings)
    ends = _ends(model, tokenizer)
    asked = _asked(plan, model, ends, states, tell)
    examples += asked["replay"]
    # The order is the seed's; replayed examples are not to stand at the end.
    random.Random(seed).shuffle(examples)  # noqa: S311
    if settings.training.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=bool(settings.training.get("gradient_checkpointing")),
        )
    set_seed(seed)
    model = base.with_adapter(model, settings)
    trainer = _trainer(plan, model, tokenizer, examples, held_out, states, tell)
    last = checkpoints.last(states)
    begun = time.monotonic()
    before = _before(trainer, states) if held_out else None
    set_seed(seed)
    output = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    seconds = time.monotonic() - begun
    history = trainer.state.log_history
    after = trainer.evaluate()["eval_loss"] if held_out else None
    tell("writing")
    _check_finite(output.training_loss, settings)
    _save(model, name or plan.model, out)
    tell("comparing")
    kept = answers.compare(model, asked["probes"], tokenizer, ends)
    trained, total = model.get_nb_trainable_parameters()
    wire = estimate.told(plan)
    wire["examples"] |= {
        "train": len(examples) - len(asked["replay"]),
        "cut": sum(example.is_cut for example in [*examples, *held_out]),
        "tokens": sum(len(example.tokens) for example in examples),
        "learned_tokens": sum(example.learned for example in examples),
    }
    return wire | {
        "losses": [[row["step"], row["loss"]] for row in history if "loss" in row],
        "held_out_losses": [[r["step"], r["eval_loss"]] for r in history if "eval_loss" in r],
        "held_out_loss": None if after is None else {"before": before, "after": after},
        "kept": kept.to_wire(),
        "notes": _notes(plan, trainer.state, kept, wire["examples"]["cut"]),
        "steps": trainer.state.global_step,
        "epochs": round(float(trainer.state.epoch or 0.0), 2),
        "resumed_from": None if last is None else checkpoints.step_of(last),
        "tokens_per_second": round(trainer.figures.tokens / max(seconds, 1e-9), 1),
        "trained_parameters": trained,
        "parameters": total,
        "libraries": _versions("peft", "transformers", "accelerate", "torch"),
        "files": (files := written(out)),
        "bytes": sum(files.values()),
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _asked(
    plan: Plan, model: Any, ends: Sequence[int], states: Path, tell: Telling
) -> dict[str, list[Any]]:
    """What the base itself answers: to the probes, and to what is to be replayed and has no answer.
    It is kept, so that a training that goes on has the same."""
    encoder = plan.encoder("replay")
    with_answer = [record for record in plan.replay if _has_answer(record)]
    without = [record for record in plan.replay if not _has_answer(record)]
    path = states / "answers.json"
    found = _read(path)
    if not found:
        own = plan.settings.own.probes
        probes = [encoder.prompt(_text(prompt)) for prompt in own or answers.PROBES]
        prompts = [encoder.prompt(record) for record in without]
        asked = [*probes, *prompts]
        given = answers.generate(model, asked, ends, lambda done: tell("asking", done, len(asked)))
        found = {"probes": given[: len(probes)], "replay": given[len(probes) :]}
        _write(path, found)
    replay = encoder.examples(with_answer)
    for record, (prompt, answer) in zip(without, found["replay"], strict=True):
        replay.append(encoder.answered(record, prompt, answer))
    return {"probes": [answers.Answer(*one) for one in found["probes"]], "replay": replay}


def _notes(plan: Plan, state: Any, kept: answers.Kept, cut: int) -> list[str]:
    """What else is to be known of a training: sentences."""
    notes = []
    if kept.same < kept.prompts:
        notes.append(
            f"{kept.prompts - kept.same} of {kept.prompts} prompts that are not of the data are "
            "answered otherwise than by the base. `replay:` has it keep what it says; fewer "
            "`epochs` and a lower `learning_rate` change less."
        )
    if cut:
        notes.append(f"{cut} examples were cut, at {plan.max_length} tokens (`max_length`).")
    if state.global_step < state.max_steps:
        notes.append(
            f"It ended after {state.global_step} of {state.max_steps} steps: the held-out loss was "
            "no longer better (`early_stopping_patience`). The adapter is of the best state."
        )
    return notes


def _before(trainer: Any, states: Path) -> float:
    """The held-out loss of the base, measured once."""
    path = states / "before.json"
    found = _read(path)
    if found is None:
        found = trainer.evaluate()["eval_loss"]
        _write(path, found)
    return float(found)


def _has_answer(record: Record) -> bool:
    fields = record.fields
    if "messages" in fields:
        return bool(fields["messages"][-1]["role"] == "assistant")
    return "text" in fields or "completion" in fields


def _text(prompt: str) -> Record:
    return Record({"prompt": prompt}, data.Place(None, 0))


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    said = model.generation_config.eos_token_id
    ends = said if isinstance(said, list) else [said]
    return [end for end in [*ends, tokenizer.eos_token_id] if end is not None] or [0]


def _trainer(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    states: Path,
    tell: Telling,
) -> Any:
    import torch
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

    from vllm_bridge.jobs.finetune.callbacks import Figures

    settings = plan.settings
    pad = tokenizer.pad_token_id
    filled = data.batches(tokenizer.eos_token_id if pad is None else pad)

    def collate(batch: Sequence[Example]) -> dict[str, Any]:
        return {name: torch.tensor(rows) for name, rows in filled(batch).items()}

    stops_early = settings.own.early_stopping_patience is not None
    training = dict(settings.training)
    if stops_early:
        # The best state can be gone back to where it was written.
        training["save_steps"] = training["eval_steps"]
    arguments = TrainingArguments(
        **{
            "bf16": torch.cuda.is_available() and base.dtype(settings) == "bfloat16",
            "dataloader_pin_memory": torch.cuda.is_available(),
            "data_seed": settings.training["seed"],
            **training,
        },
        output_dir=str(states),
        eval_strategy="steps" if held_out else "no",
        save_strategy="steps",
        logging_strategy="steps",
        load_best_model_at_end=stops_early,
        metric_for_best_model="eval_loss" if stops_early else None,
        greater_is_better=False if stops_early else None,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=not torch.cuda.is_available(),
    )
    figures = Figures(states, tell, [len(example.tokens) for example in examples])
    callbacks: list[Any] = [figures]
    if stops_early:
        callbacks.append(
            EarlyStoppingCallback(
                settings.own.early_stopping_patience, settings.own.early_stopping_threshold
            )
        )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(examples),
        eval_dataset=list(held_out) or None,
        data_collator=collate,
        callbacks=callbacks,
    )
    trainer.figures = figures
    return trainer


def _save(model: Any, base_name: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(str(out))
    for path in out.iterdir():
        # peft's card is a form that is not filled in.
        if path.name not in ADAPTER_FILES:
            path.unlink()


def _check_finite(loss: float, settings: Settings) -> None:
    if not math.isfinite(loss):
        raise BridgeError(
            "failed",
            f"The training diverged: its loss is {loss}.",
            {"learning_rate": settings.training["learning_rate"]},
            remedy="Try a lower `learning_rate`.",
        )


def _versions(*names: str) -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in names}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)
