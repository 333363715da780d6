"""What is told of a training while it runs, and when a state of it is whole."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vllm_bridge.jobs.finetune import checkpoints
from vllm_bridge.jobs.task import Telling


class Figures(TrainerCallback):  # type: ignore[misc]
    """
    Args:
        states: the folder that states are written into
        tell: told how far it is; see ``jobs.task``
        lengths: of the examples, in tokens
    """

    def __init__(self, states: Path, tell: Telling, lengths: Sequence[int]) -> None:
        self._states = states
        self._tell = tell
        self._mean = sum(lengths) / max(1, len(lengths))
        self._began = 0.0
        self._losses: dict[str, float] = {}
        self.tokens = 0.0  # that were trained on in this run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()
        self._step(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tokens += self._mean * args.train_batch_size * args.gradient_accumulation_steps
        self._step(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for name, called in (("loss", "loss"), ("eval_loss", "held_out_loss")):
            if name in (logs or {}):
                self._losses[called] = float(logs[name])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoints.mark(self._states, state.global_step)

    def _step(self, args: Any, state: Any) -> None:
        seconds = time.monotonic() - self._began
        speed = round(self.tokens / seconds, 1) if self.tokens else None
        self._tell(
            "training",
            state.global_step,
            state.max_steps,
            tokens_per_second=speed,
            **self._losses,
        )
