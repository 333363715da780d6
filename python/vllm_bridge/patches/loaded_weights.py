"""Keeps a model from running with weights that its checkpoint does not have.

vLLM looks at few of the weights, and of a quantized model at none: what is missing stays what the
memory held, and the model answers nonsense. So it is watched what the model's parameters are
given while it loads: of several tensors that become one parameter (queries, keys and values;
the matrices of experts) one may be missing.
"""

import functools
import math
import re
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_bridge.patches import replace

SEEN = ("0.32.",)
TOUCHES = {"vllm.model_executor.model_loader.base_loader": ("BaseModelLoader.load_model",)}

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")

# What comes before the number of a layer.
_OF_LAYER = re.compile(r"^.*?(?=\.\d+\.)")

# What the numbers of a quantized layer mean.
_SCALES = re.compile(r"(?:scale|zero)[^.]*$")

# What loaders raise over weights that do not fit, and what is no word about weights.
_MISFITS = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)
_NO_MISFITS = (NotImplementedError, torch.OutOfMemoryError)


def apply() -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    replace(BaseModelLoader, "load_model", watching)


def watching(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(
        self: Any, vllm_config: Any, model_config: Any, *args: Any, **keywords: Any
    ) -> Any:
        # vLLM's own switch; and what a draft model guesses is verified by the model.
        is_unwanted = getattr(self, "enable_weights_track", None) is False
        if not is_unwanted and model_config.runner_type != "draft":
            self.load_weights = functools.partial(_load_weights, self.load_weights)
        try:
            return original(self, vllm_config, model_config, *args, **keywords)
        finally:
            vars(self).pop("load_weights", None)

    return load_model


def _load_weights(of_loader: Any, model: Any, model_config: Any) -> None:
    """Has a loader load a model's weights, and looks at what the model has been given.

    Raises:
        ValueError: in vLLM's words, or with the tensor of the checkpoint that does not fit
    """
    watch = Watch(model)
    # Loaders that do not use it make weights up, or copy those that another engine had.
    model.load_weights = functools.partial(watch.load, model.load_weights)
    try:
        of_loader(model, model_config)
    except Exception as error:
        watch.check()
        if not isinstance(error, _MISFITS) or isinstance(error, _NO_MISFITS):
            raise
        if watch.reading is None or "memory" in str(error):
            raise
        raise ValueError(
            f"The checkpoint's {watch.reading}{_divided()} does not fit: {_words(error)}"
        ) from error
    finally:
        del model.load_weights
    watch.check()
    _check_numbers(model, watch)


class Watch(TorchDispatchMode):  # type: ignore[misc]
    """What the parameters of a model are given while it loads.

    PyTorch's operations are watched, because vLLM has many ways to bring a tensor to its place.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # The tensor of the checkpoint that is being loaded, in words.
        self.reading: str | None = None
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._owners = owners(model)
        self._read: set[str] = set()
        self._loaded: set[str] | None = None
        self._is_done = False
        # By the memory of a parameter, its name, and the parts that were written.
        self._names = {
            key: name for name, p in self._parameters.items() if (key := _memory(p)) is not None
        }
        self._written: dict[int, set[tuple[int, Any]]] = defaultdict(set)
        self._forms: dict[Any, Any] = {}

    def load(self, of_model: Any, weights: Any, *args: Any, **keywords: Any) -> Any:
        """Loads by ``of_model``, a model's ``load_weights``."""
        with self:
            names = of_model(self._told(weights), *args, **keywords)
        self._loaded = None if names is None else set(names)  # vLLM adds to its own
        self._is_done = True
        return names

    def _told(self, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for name, tensor in weights:
            self._read.add(name)
            self.reading = f"`{name}` ({_dtype(tensor)} {list(tensor.shape)})"
            yield name, tensor
            self.reading = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            alias = func._schema.arguments[0].alias_info
            memory = _memory(args[0])
            if alias is not None and alias.is_write and memory in self._names:
                if func is torch.ops.aten.copy_.default:
                    self._check_dtype(self._names[memory], *args[:2])
                form = (tuple(args[0].shape), tuple(args[0].stride()))
                part = args[0].storage_offset(), self._forms.setdefault(form, form)
                self._written[memory].add(part)
        return func(*args, **(kwargs or {}))

    def _check_dtype(self, name: str, target: Any, source: Any) -> None:
        # vLLM would make numbers of one kind of those of another, as if they meant the same. A
        # shape means the same.
        if name.endswith("_shape") or not self._is_layer(name):
            return
        if _kind(source.dtype) != _kind(target.dtype):
            raise TypeError(f"the model holds {_dtype(target)} there")

    def check(self) -> None:
        """Raises a ``ValueError`` in vLLM's words if there are parameters that lack something."""
        if not self._is_done:
            return
        missing = sorted({*self._missing(), *self._torn()})
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                "Following weights were not initialized from checkpoint: "
                f"{', '.join(missing[:3])}{more}"
            )

    def is_whole(self, name: str) -> bool:
        """Whether all of a parameter was written, or it came after the others."""
        return name not in self._parameters or self._count(name) >= _size(self._parameters[name])

    def _missing(self) -> Iterator[str]:
        """The parameters that were given nothing and need it: those that other layers were given,
        all of linear layers and experts without any weights, biases, scales and zero points beside
        scales that were given, embeddings, and what has no method of quantization, which would
        make it.

        Some models give others values of their own."""
        if self._loaded is None:
            return
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        given = {n for n in self._parameters if n in self._loaded or self._count(n)}
        kinds = {_INDEX.sub("*", name) for name in given}
        alive = {id(self._owners[name]) for name in given if not name.endswith(".bias")}
        scaled = {id(self._owners[name]) for name in given if _SCALES.search(name)}
        for name in self._parameters:
            owner = self._owners[name]
            if (
                name not in given
                and self._is_needed(name)
                and (
                    _INDEX.sub("*", name) in kinds
                    or (self._is_layer(name) and id(owner) not in alive)
                    or (isinstance(owner, LinearBase) and name.endswith(".bias"))
                    or (self._is_layer(name) and _SCALES.search(name) and id(owner) in scaled)
                    or isinstance(owner, VocabParallelEmbedding)
                    or getattr(owner, "quant_method", None) is None
                )
            ):
                yield name

    def _torn(self) -> Iterator[str]:
        """The tensors that are missing of parameters which several tensors of a checkpoint become.

        Some parameters have room that nothing is for: what none of its kind has is not missed,
        unless it is the only one, or the checkpoint has the tensors for the rest of it."""
        kinds: dict[Any, dict[tuple[str, int | None], int]] = defaultdict(dict)
        for name, parameter in self._parameters.items():
            if self._is_layer(name) and self._is_needed(name) and self._count(name):
                kind = kinds[_INDEX.sub("*", name), tuple(parameter.shape)]
                for row, count in self._rows(name):
                    kind[name, row] = count
        for counts in kinds.values():
            most = max(counts.values())
            for (name, row), count in counts.items():
                room = _size(self._parameters[name])
                if row is not None:
                    room //= len(self._parameters[name])
                torn = count < (most if len(counts) > 1 else room)
                lacking = self._unread(name, row) if torn or count < room else []
                if row is not None and (torn or lacking):
                    yield f"{name} (expert {row})"
                elif torn or lacking:
                    yield from lacking or [name]

    def _unread(self, name: str, expert: int | None) -> list[str]:
        """The tensors of a parameter, or of one expert's part of it, that the checkpoint does not
        have, where it has others."""
        module, _, last = name.rpartition(".")
        if expert is None:
            parent, _, module = module.rpartition(".")
            tensors = [f"{parent}.{part}.{last}" for part in self._packed.get(module, [])]
        else:
            parent = module.partition(".experts.")[0]
            prefix, _, last = last.partition("_")
            parts = self._experts.get((prefix, expert), [])
            tensors = [f"{parent}.{part}{last}" for part in parts]
        # A checkpoint may have another name for what the layers are in.
        lacking = [tensor for tensor in tensors if _OF_LAYER.sub("", tensor) not in self._tails]
        return lacking if 0 < len(lacking) < len(tensors) else []

    @functools.cached_property
    def _tails(self) -> set[str]:
        """The names of the tensors that were read, from the number of their layer on."""
        return {_OF_LAYER.sub("", name) for name in self._read}

    @functools.cached_property
    def _packed(self) -> dict[str, list[str]]:
        """The modules of a checkpoint that become one of vLLM's, by its name."""
        from vllm.model_executor.utils import get_packed_modules_mapping

        return dict(get_packed_modules_mapping(self._model))

    @functools.cached_property
    def _experts(self) -> dict[tuple[str, int], list[str]]:
        """The modules of a checkpoint that become one expert's part of ``w13`` or ``w2``."""
        from vllm.model_executor.utils import get_moe_expert_mapping

        found: dict[tuple[str, int], list[str]] = defaultdict(list)
        try:
            mapping = get_moe_expert_mapping(self._model)
        except (ValueError, NotImplementedError):  # models with a way of their own
            return found
        for parameter, part, expert, _shard in mapping:
            kind = re.search(r"w13(?=_)|w2(?=_)", parameter)
            if kind is not None and part.endswith("."):
                found[kind[0], expert].append(part)
        return found

    def _is_layer(self, name: str) -> bool:
        """Whether a parameter belongs to linear layers or experts, which have tensors for numbers
        of any kind."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase

        return isinstance(self._owners[name], LinearBase | RoutedExperts)

    def _is_needed(self, name: str) -> bool:
        from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
        from vllm.model_executor.model_loader.default_loader import _CONFIG_BUILT_PARAMS

        method = getattr(self._owners[name], "quant_method", None)
        return (
            _size(self._parameters[name]) > 0
            and not isinstance(method, BaseKVCacheMethod)  # has defaults
            and name.rpartition(".")[2] not in _CONFIG_BUILT_PARAMS
        )

    def _count(self, name: str) -> int:
        """How many numbers of a parameter were written."""
        return sum(math.prod(shape) for _, (shape, _) in self._parts(name))

    def _rows(self, name: str) -> Iterator[tuple[int | None, int]]:
        """The same for each expert, by its place; for layers that are none under None."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        if not isinstance(self._owners[name], RoutedExperts):
            yield None, self._count(name)
            return
        parameter = self._parameters[name]
        rows = [0] * len(parameter)
        length, start = parameter.stride(0), parameter.storage_offset()
        for offset, (shape, strides) in self._parts(name):
            last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            first, last = (offset - start) // length, (last - start) // length
            for row in range(first, last + 1):
                rows[row] += math.prod(shape) // (last - first + 1)
        yield from enumerate(rows)

    def _parts(self, name: str) -> set[tuple[int, Any]]:
        memory = _memory(self._parameters[name])
        return self._written[memory] if memory is not None and memory in self._written else set()


def _check_numbers(model: Any, watch: Watch) -> None:
    """Raises a ``ValueError`` if weights or scales are infinite or not numbers: whatever they
    touch becomes so too. Embeddings are left out, which have tokens that nobody uses."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    of = owners(model)
    for name, parameter in model.named_parameters():
        if isinstance(of[name], VocabParallelEmbedding) or not watch.is_whole(name):
            continue
        # What bitsandbytes has beside its weights: of one matrix, or of several by their places.
        states = getattr(parameter, "bnb_quant_state", {})
        states = states.values() if isinstance(states, dict) else [states]
        scales = [getattr(state, "absmax", state) for state in states]
        if not all(_is_finite(tensor) for tensor in (parameter, *scales)):
            raise ValueError(f"Following weights are not finite numbers: {name}")


def _is_finite(tensor: Any) -> bool:
    if tensor.is_meta or tensor.numel() == 0 or _kind(tensor.dtype) != "float":
        return True
    try:
        bounds = torch.aminmax(tensor.detach())
    except (NotImplementedError, RuntimeError, TypeError):
        return True  # tensors of other libraries
    return all(math.isfinite(bound) for bound in bounds)


def owners(model: Any) -> dict[str, Any]:
    """The modules of a model's parameters, by their names."""
    return {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def _memory(tensor: Any) -> int | None:
    """What tells the memory of a tensor from that of others."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, ValueError):
        return None  # tensors of other libraries, and those that have none yet


def _size(parameter: Any) -> int:
    """How many numbers are to be written of a parameter, without those that only fill it up."""
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    return int(get_tensor_load_numel(parameter))


def _kind(dtype: Any) -> str:
    if not dtype.is_floating_point or "float4" in str(dtype):
        return "integer"
    # Powers of two are numbers like any others; other floats of 8 bits go with a scale.
    return "float8" if dtype.itemsize == 1 and "e8m0" not in str(dtype) else "float"


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _divided() -> str:
    from vllm.distributed import get_tensor_model_parallel_world_size

    ranks = get_tensor_model_parallel_world_size()
    return f", divided among {ranks} ranks," if ranks > 1 else ""


def _words(error: Exception) -> str:
    if text := str(error):
        return text
    # An assertion without words is its own line.
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].line if frames else None) or type(error).__name__
