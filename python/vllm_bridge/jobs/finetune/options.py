"""The options of a fine-tuning: those of peft's ``LoraConfig``, of transformers'
``TrainingArguments`` and ``BitsAndBytesConfig``, by their own names, and a few of this library's.
The classes are asked what they have, so that an option of a newer version is one here too."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Final

from vllm_bridge.errors import BridgeError, unknown_name

# What the library sets itself, or what belongs to a training that is no job on one machine.
_SET_HERE: Final = frozenset(
    {
        "output_dir", "report_to", "run_name", "project", "resume_from_checkpoint", "do_train",
        "do_eval", "do_predict", "disable_tqdm", "remove_unused_columns", "label_names",
        "push_to_hub", "deepspeed", "local_rank", "debug", "save_only_model", "save_on_each_node",
        "task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision",
        "auto_mapping", "peft_version", "include_num_input_tokens_seen", "include_for_metrics",
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "use_cpu",
        "batch_eval_metrics", "prediction_loss_only", "length_column_name", "save_strategy",
        "logging_strategy", "eval_strategy", "runtime_config",
    }
)  # fmt: skip
_SET_HERE_PREFIXES: Final = ("hub_", "fsdp", "ddp_", "megatron_", "trackio_", "log_level")

# Other names that people know them by.
_ALIASES: Final = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}

# For adapters other values than those of the classes, which are for whole models.
_LORA: Final = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
_TRAINING: Final = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-4,
    "seed": 42,
    # Shares of all steps.
    "logging_steps": 0.02,
    "eval_steps": 0.1,
    "save_steps": 0.1,
    "save_total_limit": 2,
}
_BITSANDBYTES: Final = {
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


@dataclasses.dataclass(frozen=True)
class Own:
    """The options that are this library's.

    Args:
        max_length: tokens of an example; None for the least of 1024 and what the model has
        held_out: a share of the data, or data of its own; None for a twentieth of 100 and more
        replay: data that is trained on too, so that the model keeps what it says there
        probes: prompts that the base answers before and after; None for some that ship with this
        early_stopping_patience: evaluations without a better held-out loss after which it ends
        early_stopping_threshold: what counts as better
        dtype: of the base's plain weights; None for float32 on CPUs and bfloat16 elsewhere
        merge: whether the adapter is also merged into the base
    """

    max_length: int | None = None
    held_out: Any = None
    replay: Any = None
    probes: list[str] | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    dtype: str | None = None
    merge: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """All options, with the values that they have.

    Args:
        lora: of ``LoraConfig``
        training: of ``TrainingArguments``
        bitsandbytes: of ``BitsAndBytesConfig``; empty where the base is not quantized for training
    """

    lora: Mapping[str, Any]
    training: Mapping[str, Any]
    bitsandbytes: Mapping[str, Any]
    own: Own

    def to_wire(self) -> dict[str, Any]:
        """What a result says of them; data is not repeated."""
        own = dataclasses.asdict(self.own)
        for name in ("held_out", "replay", "probes"):
            if isinstance(own[name], list):
                own[name] = len(own[name])
        return {**self.lora, **self.training, **self.bitsandbytes, **own}


def parse(options: Mapping[str, Any]) -> Settings:
    """
    Raises:
        BridgeError: ``invalid_option`` for names that no class has, with the nearest, and for
            values that a class does not take
    """
    given = {_ALIASES.get(name, name): value for name, value in options.items()}
    lora, training, bitsandbytes = _lora_names(), _training_names(), _bitsandbytes_names()
    own = {field.name: field for field in dataclasses.fields(Own)}
    for name in given:
        if name in _SET_HERE or name.startswith(_SET_HERE_PREFIXES):
            raise BridgeError(
                "invalid_option",
                f"`{name}` is not an option of a fine-tuning: the job itself sets it.",
                {"option": name},
                remedy="Leave it out.",
            )
        if name not in {**lora, **training, **bitsandbytes, **own}:
            raise unknown_name(
                "option of a fine-tuning", name, [*lora, *training, *bitsandbytes, *own, *_ALIASES]
            )
    quantizes = given.get("load_in_4bit") or given.get("load_in_8bit")
    settings = Settings(
        lora=_LORA | _taken(given, lora),
        training=_TRAINING | _taken(given, training),
        bitsandbytes=_BITSANDBYTES | _taken(given, bitsandbytes) if quantizes else {},
        own=_own({name: given[name] for name in given if name in own}),
    )
    for name in given:
        if name in bitsandbytes and not quantizes:
            raise BridgeError(
                "invalid_option",
                f"`{name}` is for a base that is quantized for training.",
                {"option": name},
                remedy="Give `load_in_4bit: true` or `load_in_8bit: true` too.",
            )
    _check(settings)
    return settings


def _taken(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _number(value, known[name])
        for name, value in given.items()
        if name in known and value is not None
    }


def _number(value: Any, annotation: Any) -> Any:
    """A whole number where the class has one with a fraction; on the wire the two are one."""
    if isinstance(value, int) and not isinstance(value, bool) and "float" in str(annotation):
        return float(value)
    return value


def _own(given: Mapping[str, Any]) -> Own:
    own = Own(**given)
    checks = {
        "max_length": own.max_length is None or (_is_whole(own.max_length) and own.max_length > 1),
        "held_out": not isinstance(own.held_out, (int, float)) or 0 <= own.held_out < 1,
        "probes": own.probes is None
        or (isinstance(own.probes, list) and all(isinstance(p, str) and p for p in own.probes)),
        "early_stopping_patience": own.early_stopping_patience is None
        or (_is_whole(own.early_stopping_patience) and own.early_stopping_patience > 0),
        "early_stopping_threshold": isinstance(own.early_stopping_threshold, (int, float)),
        "dtype": own.dtype in (None, "float32", "bfloat16"),
        "merge": isinstance(own.merge, bool),
    }
    wanted = {
        "max_length": "a number of tokens above 1",
        "held_out": "a share below 1, a list of records or a path",
        "probes": "a list of prompts",
        "early_stopping_patience": "a number of evaluations above 0",
        "early_stopping_threshold": "a number",
        "dtype": '`"float32"` or `"bfloat16"`',
        "merge": "true or false",
    }
    for name, is_right in checks.items():
        if not is_right:
            raise BridgeError(
                "invalid_option",
                f"`{name}` must be {wanted[name]}, not {getattr(own, name)!r}.",
                {"option": name, "value": getattr(own, name)},
            )
    return own


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _lora_names() -> dict[str, Any]:
    from peft import LoraConfig

    return _fields(LoraConfig)


def _training_names() -> dict[str, Any]:
    from transformers import TrainingArguments

    return _fields(TrainingArguments)


def _bitsandbytes_names() -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    return {
        name: parameter.annotation
        for name, parameter in inspect.signature(BitsAndBytesConfig).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _fields(of: Any) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(of) if field.init}


def _check(settings: Settings) -> None:
    """Has the classes look at the values."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    _made("LoraConfig", settings.lora, lambda: LoraConfig(task_type="CAUSAL_LM", **settings.lora))
    _made("TrainingArguments", settings.training, lambda: _training_arguments(settings))
    if settings.bitsandbytes:
        _made(
            "BitsAndBytesConfig",
            settings.bitsandbytes,
            lambda: BitsAndBytesConfig(**settings.bitsandbytes),
        )
    for name in ("num_train_epochs", "per_device_train_batch_size", "learning_rate"):
        value = settings.training[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise _refused(name, value, "it must be a number above 0")
    if not _is_whole(settings.lora["r"]):
        raise _refused("r", settings.lora["r"], "it must be a whole number above 0")


def _training_arguments(settings: Settings) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(output_dir="unused", report_to=[], use_cpu=True, **settings.training)


def _made(kind: str, values: Mapping[str, Any], make: Any) -> None:
    try:
        make()
    except Exception as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        named = next((name for name in values if f"`{name}`" in said or name in said.split()), None)
        raise BridgeError(
            "invalid_option",
            f"{kind} does not take these options: {said}",
            {"option": named, "class": kind},
        ) from error


def _refused(name: str, value: Any, why: str) -> BridgeError:
    return BridgeError(
        "invalid_option", f"`{name}` is {value!r}: {why}.", {"option": name, "value": value}
    )
