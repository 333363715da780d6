"""What is known of a training before anything is loaded: its base, its options and its data."""

from collections.abc import Mapping
from typing import Any, Final

from vllm_bridge.checkpoints import models
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.finetune import base, data, options
from vllm_bridge.jobs.finetune.data import Example, Record, Records
from vllm_bridge.jobs.finetune.options import Settings
from vllm_bridge.sizing import layers

# Without other instructions: the most tokens of an example, and, of that many records and more, the
# share of them that is held out.
MAX_LENGTH: Final = 1024
HELD_OUT: Final = 0.05
HOLDS_OUT_FROM: Final = 100

# What configs call the number of positions that a model has; some name none.
_POSITIONS: Final = ("max_position_embeddings", "n_positions", "max_seq_len")


class Plan:
    """What is known before anything is loaded.

    Args:
        model: as the user calls it
        given_data: what is trained on
        given: the options, as the user gave them
        engine: options of an engine, which say where the model is. Of one that is still to be
            downloaded its headers are read; its tokenizer makes no tokens of the data yet

    Raises:
        BridgeError: for whatever is wrong with one of them
    """

    def __init__(
        self,
        model: str,
        given_data: Any,
        given: Mapping[str, Any],
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        base.check_packages()
        self.model = model
        self.settings: Settings = options.parse(given)
        own = self.settings.own
        self.checkpoint: Checkpoint = models.check_model(model, engine or {})
        base.check(self.checkpoint, bool(self.settings.bitsandbytes))
        _check_served(self.settings)
        self.records = _records(given_data, self.settings)
        self.replay: tuple[Record, ...] = ()
        self.train: list[Example] = []
        self.held_out: list[Example] = []
        if own.replay is not None:
            self.replay = data.read(own.replay, "replay", needs_answer=False).train
        if own.early_stopping_patience is not None and not self.records.held_out:
            raise BridgeError(
                "invalid_option",
                "`early_stopping_patience` needs data that is held out, and none is.",
                {"option": "early_stopping_patience"},
                remedy="Give `held_out:`, a share of the data, a list or a path.",
            )
        longest = layers.text_config(self.checkpoint.config).number(*_POSITIONS)
        self.max_length = own.max_length or min(MAX_LENGTH, longest or MAX_LENGTH)
        if longest and self.max_length > longest:
            raise BridgeError(
                "invalid_option",
                f"`max_length` is {self.max_length}, and the model has {longest} positions.",
                {"option": "max_length", "max_position_embeddings": longest},
                remedy=f"Give at most {longest}.",
            )
        if self.checkpoint.repository is None:
            self.tokenizer = base.tokenizer(self.checkpoint)
            self.train = self.encoder("data").examples(self.records.train)
            self.held_out = self.encoder("held_out").examples(self.records.held_out)

    def encoder(self, option: str) -> data.Encoder:
        return data.Encoder(self.tokenizer, self.max_length, option)

    def to_wire(self) -> dict[str, Any]:
        """What is told of it."""
        return {
            "base": base.says(self.checkpoint, self.settings),
            "options": self.settings.to_wire() | {"max_length": self.max_length},
            "examples": {
                "train": len(self.records.train),
                "held_out": len(self.records.held_out),
                "replay": len(self.replay),
            },
        }


def _records(given: Any, settings: Settings) -> Records:
    records = data.read(given)
    own, seed = settings.own, settings.training["seed"]
    if own.held_out is None:
        share = HELD_OUT if len(records.train) >= HOLDS_OUT_FROM else 0.0
        return data.split(records, share, seed)
    if isinstance(own.held_out, (int, float)):
        return data.split(records, float(own.held_out), seed)
    return records._replace(held_out=data.read(own.held_out, "held_out").train)


def _check_served(settings: Settings) -> None:
    """Refuses adapters that vLLM would not load, unless they are merged. vLLM is asked only of what
    is unusual: its import takes seconds."""
    usual = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora"}
    unusual = sorted(settings.lora.keys() - usual)
    if not unusual or settings.own.merge:
        return
    from peft import LoraConfig
    from vllm.lora.peft_helper import PEFTHelper

    config = LoraConfig(task_type="CAUSAL_LM", **settings.lora).to_dict()
    try:
        wrong = PEFTHelper.from_dict(config)._validate_features()
        wrong += [] if config["bias"] == "none" else ["vLLM does not support `bias`."]
    except Exception as error:
        wrong = [str(error)]
    if wrong:
        raise BridgeError(
            "unsupported",
            f"vLLM would not load the adapter: {' '.join(wrong)}",
            {"option": unusual[0]},
            remedy="Leave the option out, or give `merge: true` to have a merged model of it.",
        )
