"""compressed-tensors: integers and floats of few bits in many schemes, by llmcompressor."""

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.jobs.quantize import transformers_models
from vllm_bridge.jobs.quantize.calibration import Texts
from vllm_bridge.jobs.quantize.producer import Made, Option, Source, Tell, declared

NAME = "compressed-tensors"

_LIBRARIES = ("llmcompressor", "compressed-tensors", "transformers", "torch")

_TARGETS = ["Linear"]

# What has an effect with one algorithm only.
_OF_ALGORITHMS = {
    "gptq": ("block_size", "dampening_frac", "actorder"),
    "awq": ("duo_scaling", "n_grid"),
}


_LEAST_GRID = 4


def options() -> Mapping[str, Option]:
    return _declared()


def presets() -> Mapping[str, Mapping[str, Any]]:
    return {name: {"scheme": name} for name in _schemes()}


def texts(options: Mapping[str, Any]) -> Literal["unused", "optional", "required"]:
    needed = any(modifier.requires_calibration_data for modifier in _recipe(options))
    return "required" if needed else "unused"


def check(source: Source | None, options: Mapping[str, Any]) -> None:
    algorithm, known = _algorithm(options), _declared()
    for other, names in _OF_ALGORITHMS.items():
        for name in names:
            if other != algorithm and options[name] != known[name].default:
                raise BridgeError(
                    "invalid_option",
                    f"`{name}` has no effect: the algorithm is `{algorithm}`.",
                    {"option": name, "algorithm": algorithm},
                    remedy=f"Leave it out, or set `algorithm` to `{other}`.",
                )
    if options["n_grid"] < _LEAST_GRID:
        raise BridgeError(
            "invalid_option",
            f"`n_grid` is {options['n_grid']}, and llmcompressor divides by zero for less than "
            f"{_LEAST_GRID}.",
            {"option": "n_grid", "value": options["n_grid"]},
            remedy="20 is usual.",
        )
    recipe = _recipe(options)
    if source is not None:
        _check_model(source, options, recipe)


def label(options: Mapping[str, Any]) -> str:
    parts = [options["scheme"]]
    if options["group_size"] is not None:
        size = options["group_size"]
        parts.append("channel" if size == -1 else f"{size}g")
    if _algorithm(options) != _algorithm({**options, "algorithm": None}):
        parts.append(options["algorithm"])
    if options["smoothing_strength"] is not None:
        parts.append("smooth")
    return "-".join(parts)


def make(
    source: Source, options: Mapping[str, Any], texts: Texts | None, out: str, tell: Tell
) -> Made:
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = _recipe(options)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    with _without_pictures(), load_quantizable_moe(AutoModelForCausalLM):
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype="auto")
    rows = [] if texts is None else texts.ids(tokenizer)
    passes = sum(modifier.requires_calibration_data for modifier in recipe)
    layers = model.config.get_text_config().num_hidden_layers
    with _unpinned(), _told(tell, layers * passes):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=_loader(rows),
            recipe=recipe,
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
            output_dir=out,
        )
    transformers_models.put_together(source, out)
    return Made(
        libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
        options=_effective(options),
    )


def _declared() -> dict[str, Option]:
    from compressed_tensors.quantization.quant_args import ActivationOrdering
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    orders = tuple(sorted({one.value for one in ActivationOrdering}))
    own = (
        Option(
            "scheme",
            (str,),
            "W4A16",
            tuple(_schemes()),
            "The bits of weights and of activations, as compressed-tensors calls them. Those with "
            "4-bit floats, MXFP8, or other integers than of 4 and 8 bits are for GPUs.",
        ),
        Option(
            "algorithm",
            (str,),
            None,
            ("rtn", "gptq", "awq"),
            "How weights are rounded: to the nearest, or so that outputs change little. None is "
            "`gptq` for integers of less than eight bits, and `rtn` for all else.",
        ),
        Option(
            "group_size",
            (int,),
            None,
            doc="How many weights of a row share a scale, in schemes with groups; None is its own.",
        ),
        Option(
            "ignore",
            (list,),
            ["lm_head"],
            doc="Names of layers that are left as they are, or `re:` and a pattern of them.",
        ),
    )
    return {
        **{option.name: option for option in own},
        **declared(
            SmoothQuantModifier,
            only=("smoothing_strength",),
            smoothing_strength={
                "types": (float,),
                "default": None,
                "doc": "SmoothQuant: how much of what is hard to round in activations goes to the "
                "weights, from 0 to 1; None is without it.",
            },
        ),
        **declared(
            GPTQModifier,
            only=_OF_ALGORITHMS["gptq"],
            block_size={"doc": "gptq: how many columns are rounded in one pass."},
            dampening_frac={"doc": "gptq: what is added to the Hessian's diagonal, of its mean."},
            actorder={
                "types": (str,),
                "allowed": orders,
                "doc": "gptq: the order of columns; None is the library's own.",
            },
        ),
        **declared(
            AWQModifier,
            only=_OF_ALGORITHMS["awq"],
            duo_scaling={
                "types": (),
                "allowed": (True, False, "both"),
                "doc": "awq: whether weights count for the scales as well as activations.",
            },
            n_grid={"doc": "awq: how many scales are tried."},
        ),
    }


def _schemes() -> list[str]:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    return [name for name, scheme in PRESET_SCHEMES.items() if scheme]


def _scheme(options: Mapping[str, Any]) -> Any:
    """The scheme with its groups as they are wished.

    Raises:
        BridgeError: ``invalid_option`` where it has no groups
    """
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = preset_name_to_scheme(options["scheme"], _TARGETS)
    size = options["group_size"]
    if size is None:
        return scheme
    if not scheme.weights.group_size:
        raise BridgeError(
            "invalid_option",
            f"`group_size` has no effect: {options['scheme']} has no groups.",
            {"option": "group_size", "scheme": options["scheme"]},
            remedy="Leave it out.",
        )
    weights = scheme.weights.model_dump() | {"group_size": size}
    if size == -1:
        weights |= {"group_size": None, "strategy": "channel"}
    try:
        return scheme.model_copy(update={"weights": type(scheme.weights)(**weights)})
    except ValueError as error:
        raise _invalid(error) from error


def _algorithm(options: Mapping[str, Any]) -> str:
    if options["algorithm"] is not None:
        return str(options["algorithm"])
    weights = _scheme(options).weights
    return "gptq" if weights.type == "int" and weights.num_bits < 8 else "rtn"


def _recipe(options: Mapping[str, Any]) -> list[Any]:
    """What llmcompressor is to do, step by step.

    Raises:
        BridgeError: ``invalid_option``
    """
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    algorithm = _algorithm(options)
    what = {"config_groups": {"group_0": _scheme(options)}, "ignore": list(options["ignore"])}
    mine = _OF_ALGORITHMS.get(algorithm, ())
    said = {name: options[name] for name in mine if options[name] is not None}
    strength = options["smoothing_strength"]
    try:
        smooth = [] if strength is None else [SmoothQuantModifier(smoothing_strength=strength)]
        if algorithm == "gptq":
            return [*smooth, GPTQModifier(**what, **said)]
        if algorithm == "awq":
            return [*smooth, AWQModifier(**said), QuantizationModifier(**what)]
        return [*smooth, QuantizationModifier(**what)]
    except ValueError as error:
        raise _invalid(error) from error


def _check_model(source: Source, options: Mapping[str, Any], recipe: list[Any]) -> None:
    """Has the library prepare the model without its weights, as far as the first text.

    Raises:
        BridgeError: ``invalid_option``, ``unsupported_model`` or ``unsupported``
    """
    from compressed_tensors.utils import match_named_modules
    from llmcompressor.core import State

    model = transformers_models.skeleton(source)
    names = [name for name, _ in model.named_modules()]
    for pattern in options["ignore"]:
        if pattern != "lm_head" and not list(match_named_modules(model, [pattern])):
            raise BridgeError(
                "invalid_option",
                f"`ignore` has `{pattern}`, and `{source.path}` has no such layer.",
                {"option": "ignore", "value": pattern},
                remedy=did_you_mean(nearest(pattern, names)),
            )
    weights = _scheme(options).weights
    for name, module in match_named_modules(model, _TARGETS, options["ignore"]):
        if weights.group_size and module.in_features % weights.group_size:
            size = weights.group_size
            raise transformers_models.no_groups(source, name, module.in_features, size)
    state = State(model=model)
    state.data.calib = ()
    try:
        for modifier in recipe:
            modifier.on_initialize(state)
        for modifier in recipe:
            modifier.on_calibration_start(state, None)
    except Exception as error:  # each modifier has its own
        raise BridgeError(
            "unsupported",
            f"llmcompressor cannot make {label(options)} of `{source.path}`: {error}",
            {"exception": f"{type(error).__name__}: {error}"},
            remedy="Choose another `algorithm` or `scheme`.",
        ) from error


def _effective(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that had an effect."""
    algorithm = _algorithm(options)
    without = {
        name for other, names in _OF_ALGORITHMS.items() if other != algorithm for name in names
    }
    said = {name: value for name, value in options.items() if name not in without}
    size = _scheme(options).weights.group_size
    return said | {"algorithm": algorithm, "group_size": size}


def _loader(rows: list[list[int]]) -> Any:
    """The texts as llmcompressor takes them, one after another; None where there are none."""
    import torch
    from torch.utils.data import DataLoader

    if not rows:
        return None
    ids = [torch.tensor([row]) for row in rows]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return DataLoader(batches, batch_size=None)


@contextlib.contextmanager
def _without_pictures() -> Iterator[None]:
    """Where classes of a mixture are replaced, transformers looks at all modules that it has
    loaded, also at other names of those for pictures, which need torchvision."""
    hidden = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers."):
            try:
                dir(module)
            except ImportError:
                hidden[name] = sys.modules.pop(name)
    try:
        yield
    finally:
        sys.modules.update(hidden)


@contextlib.contextmanager
def _unpinned() -> Iterator[None]:
    """AWQ has memory pinned for a device, which fails where there is none."""
    import torch
    from compressed_tensors.utils import patch_attr
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    with patch_attr(IntermediatesCache, "pin_memory", lambda *_args, **_named: None):
        yield


@contextlib.contextmanager
def _told(tell: Tell, total: int) -> Iterator[None]:
    """Tells how many layers are done, of all passes. Each pass has one part more than there are
    layers: the head of the model. Without a pass, all is one part."""
    from compressed_tensors.utils import patch_attr
    from llmcompressor.core import LifecycleCallbacks

    original = LifecycleCallbacks.sequential_epoch_end
    total, done = max(total, 1), 0

    def ended(*args: Any, **named: Any) -> Any:
        nonlocal done
        result = original(*args, **named)
        done = min(done + 1, total)
        tell("layers", done, total)
        return result

    tell("layers", 0, total)
    with patch_attr(LifecycleCallbacks, "sequential_epoch_end", ended):
        yield


def _invalid(error: ValueError) -> BridgeError:
    return BridgeError(
        "invalid_option",
        f"llmcompressor does not take these options: {error}",
        {"exception": f"{type(error).__name__}: {error}"},
    )
