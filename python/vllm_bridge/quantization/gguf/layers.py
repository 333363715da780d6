"""Layers whose weights stay packed as their GGUF file has them.

A linear layer of vLLM may be several of the file's (queries, keys and values; gate and up), each
with a type of its own: its bytes are one after the other in one parameter, and neighbours of one
type are computed as one. Tensors of the file that are plain numbers, and those of types that no
kernel has, become weights that vLLM computes as ever; ``loader`` dequantizes the latter.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.parameter import BasevLLMParameter
from vllm.model_executor.utils import set_weight_attrs

from vllm_bridge.checkpoints import gguf, gguf_config, gguf_names
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization.gguf import kernels
from vllm_bridge.quantization.gguf.types import TYPES
from vllm_bridge.quantization.packed import strips

# The types that are plain numbers, which vLLM computes itself.
PLAIN: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_OF_DTYPE = {dtype: name for name, dtype in PLAIN.items()}

# The file's own names of the embedding and of the head.
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"

# Those of the matrices whose columns are divided among ranks.
_DIVIDED = re.compile(r"blk\.\d+\.(attn_output|ffn_down(_exps|_shexp)?)\.weight")


def read(folder: str) -> gguf.File:
    """The GGUF file, whole or in parts, of a folder that was made for vLLM.

    Raises:
        ValueError: where there is none, which is so with a draft model (``speculative_config``):
            vLLM has the model's loader read it too
    """
    names = sorted(name for name in os.listdir(folder) if name.endswith(".gguf"))
    if not names:
        raise ValueError(
            f"`{folder}` has no GGUF file. A model beside one from a GGUF file, such as a draft of "
            "`speculative_config`, is read by the same loader: give `draft_load_config` there, or "
            "leave the draft out"
        )
    return gguf.read(os.path.join(folder, names[0]))


def has_kernel(type: str) -> bool:
    """Whether tensors of a type can stay as they are."""
    return gguf.TYPES[type].number in TYPES


@register_quantization_config("gguf")
class GGUFConfig(QuantizationConfig):  # type: ignore[misc]
    """vLLM's config of a model whose folder has GGUF files."""

    # For ``patches.embeddings``.
    has_embeddings = True

    def __init__(self) -> None:
        super().__init__()
        # The types of tensors, by the names that the model has for them in vLLM, and what they are
        # called on Hugging Face.
        self.types: dict[str, str] = {}
        self._hf_names: dict[str, str] = {}
        self._embedding = self._head = ""
        # Those whose columns ranks divide: their names, types and columns.
        self._divided: list[tuple[str, str, int]] = []
        # Which part of the weights is of which type.
        self.shares: Mapping[str, float] = {}
        # Whether activations are never rounded to 8 bits.
        self.is_exact = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GGUFConfig":
        return cls()

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        file = read(model_name)
        # Where the model has a config of the user's, it does not come to `from_config`.
        with open(os.path.join(model_name, "config.json"), encoding="utf-8") as source:
            settings = json.load(source)["quantization_config"]
        self.is_exact = settings.get("activations") == "exact"
        config = gguf_config.config(file)
        names = gguf_names.names(file, config)
        self.take({name: file.tensors[key].dtype for key, name in names.items()})
        self.shares = config["quantization_config"]["types"]
        self._divided = [
            (name, self.types[name], file.tensors[key].shape[-1])
            for key, name in names.items()
            if _DIVIDED.fullmatch(key)
        ]
        self._embedding = names[_EMBEDDING]
        self._head = names.get(_HEAD, self._embedding)

    def take(self, types: dict[str, str]) -> None:
        """Has these tensors packed in these of ggml's types."""
        self.types = types
        self._hf_names = {name: name for name in types}

    def check_ranks(self, count: int) -> None:
        """Looks whether ``count`` ranks can each have whole blocks of each matrix.

        Raises:
            BridgeError: ``unsupported_quantization``
        """
        for name, type, columns in self._divided:
            block = TYPES[gguf.TYPES[type].number].weights if has_kernel(type) else 1
            if columns % (block * count):
                raise BridgeError(
                    "unsupported_quantization",
                    f"`{name}` cannot be divided among {count} ranks: its {columns} columns are "
                    f"packed in blocks of {block} ({type}).",
                    {"option": "tensor_parallel_size", "value": count, "tensor": name},
                    remedy=(
                        "Use fewer ranks (`tensor_parallel_size`), or a variant of the model in "
                        "Q8_0 or Q4_0, whose blocks have 32."
                    ),
                )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.types = hf_to_vllm_mapper.apply_dict(self.types)
        self._hf_names = hf_to_vllm_mapper.apply_dict(self._hf_names)
        self._embedding, self._head = hf_to_vllm_mapper.apply_list([self._embedding, self._head])

    def get_name(self) -> str:
        return "gguf"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            gate, down, up = (
                f"{prefix.removesuffix('.routed_experts')}.{part}.weight"
                for part in (
                    layer.ckpt_gate_proj_name,
                    layer.ckpt_down_proj_name,
                    layer.ckpt_up_proj_name,
                )
            )
            if self._is_packed(gate, down, up):
                if layer.moe_config.is_lora_enabled:
                    raise ValueError("adapters do not go with packed experts")
                return GGUFExperts(
                    layer.moe_config, self._weights(gate, up), self._weights(down), self.is_exact
                )
            return UnquantizedFusedMoEMethod(layer.moe_config)
        if isinstance(layer, VocabParallelEmbedding):
            name = self._head if isinstance(layer, ParallelLMHead) else self._embedding
            if not self._is_packed(name):
                return None
            return GGUFEmbedding(self._weights(name), self.is_exact)
        if isinstance(layer, LinearBase):
            parent, _, module = prefix.rpartition(".")
            names = [
                f"{parent}.{part}.weight".removeprefix(".")
                for part in self.packed_modules_mapping.get(module, [module])
            ]
            if self._is_packed(*names):
                return GGUFLinear(self._weights(*names), self.is_exact)
            return UnquantizedLinearMethod()
        return None

    def _is_packed(self, *names: str) -> bool:
        types = [self.types[name] for name in names if name in self.types]
        return any(type not in PLAIN and has_kernel(type) for type in types)

    def _weights(self, *names: str) -> "list[Weight]":
        for name in names:
            if name not in self.types:
                raise ValueError(f"the GGUF files have no tensor `{name}`")
        return [Weight(self._hf_names[name], self.types[name]) for name in names]


class Weight(NamedTuple):
    """A tensor of the file.

    Args:
        name: on Hugging Face
        type: ggml's name of it
    """

    name: str
    type: str

    def number(self, dtype: torch.dtype) -> int:
        """ggml's number of the type that it has in memory, for a model that computes in
        ``dtype``."""
        name = self.type if has_kernel(self.type) else _OF_DTYPE[dtype]
        return gguf.TYPES[name].number


class Part(NamedTuple):
    """Rows of a packed layer that have one type.

    Args:
        type: ggml's number of it
        start: its first row in the layer
        rows: how many
        offset: of its first byte in the layer
        width: of a row, in bytes
    """

    type: int
    start: int
    rows: int
    offset: int
    width: int

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.width

    def of(self, data: torch.Tensor) -> torch.Tensor:
        """Its rows, of the bytes of the layer."""
        return data[..., self.offset : self.end].unflatten(-1, (self.rows, self.width))


def parts(types: Sequence[int], rows: Sequence[int], columns: int) -> list[Part]:
    """The parts of a layer.

    Args:
        types: of its matrices, or the one that all have
        rows: of each

    Raises:
        ValueError: for columns that are no whole blocks
    """
    made: list[Part] = []
    start = offset = 0
    each = types if len(types) == len(rows) else [*types] * len(rows)
    for type, group in groupby(zip(each, rows, strict=True), key=lambda one: one[0]):
        packing = TYPES[type]
        if columns % packing.weights:
            raise ValueError(
                f"{columns} columns are not whole blocks of {packing.name}, which have "
                f"{packing.weights}"
            )
        made.append(
            Part(
                type,
                start,
                sum(count for _, count in group),
                offset,
                columns // packing.weights * packing.size,
            )
        )
        start, offset = start + made[-1].rows, made[-1].end
    return made


class Packed(BasevLLMParameter):  # type: ignore[misc]
    """The bytes of a linear layer, which vLLM's layers fill: [rows, bytes of a row], or as many
    as there are where parts differ."""

    def __new__(cls, parts: list[Part], **_: Any) -> "Packed":
        data = torch.empty(parts[-1].end, dtype=torch.uint8)
        made: Packed = super().__new__(cls, data if len(parts) > 1 else parts[0].of(data))
        return made

    def __init__(self, parts: list[Part], weight_loader: Any) -> None:
        super().__init__(data=self.data, weight_loader=weight_loader)
        self.parts = parts

    # For what is whole in a file and divided by vLLM, and for embeddings.
    output_dim = 0

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        rows = sum(part.rows for part in self.parts)
        self._load(_share(loaded_weight, 0, rows, self.tp_rank, self.tp_size), 0)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        width, loaded_weight = self.parts[0].width, as_bytes(loaded_weight)
        self._load(_share(loaded_weight, 1, width, self.tp_rank, self.tp_size), 0)

    def load_merged_column_weight(
        self, loaded_weight: torch.Tensor, *, shard_offset: int, shard_size: int, **_: Any
    ) -> None:
        rows = _share(loaded_weight, 0, shard_size, self.tp_rank, self.tp_size)
        self._load(rows, shard_offset)

    def load_qkv_weight(
        self,
        loaded_weight: torch.Tensor,
        *,
        shard_id: Any,
        num_heads: int,
        shard_offset: int,
        shard_size: int,
        **_: Any,
    ) -> None:
        # Where there are more ranks than heads, several have the same keys and values.
        same = 1 if shard_id == "q" else num_heads
        rank, ranks = self.tp_rank // same, self.tp_size // same
        self._load(_share(loaded_weight, 0, shard_size, rank, ranks), shard_offset)

    def _load(self, rows: torch.Tensor, start: int) -> None:
        load(self.data.flatten(), self.parts, rows, start)


def _share(whole: torch.Tensor, dim: int, count: int, rank: int, ranks: int) -> torch.Tensor:
    """What a rank has of a tensor of the file, ``count`` of its rows or bytes."""
    if whole.shape[dim] != count * ranks:
        what = ("rows", "bytes in a row")[dim]
        raise ValueError(f"it has {whole.shape[dim]} {what}, the layer {count * ranks}")
    return whole.narrow(dim, rank * count, count)


def load(data: torch.Tensor, parts: list[Part], rows: torch.Tensor, start: int) -> None:
    """Copies rows of the file to their place among the bytes of a layer.

    Args:
        start: the first one's place among the layer's
    """
    part = next(part for part in parts if part.start <= start < part.start + part.rows)
    place = part.of(data).narrow(0, start - part.start, len(rows))
    rows = as_bytes(rows)
    if place.shape != rows.shape:
        raise ValueError(f"it has rows of {rows.shape[1]} bytes, the layer of {part.width}")
    place.copy_(rows)


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(torch.uint8)


class _Method:
    """What packed layers of all kinds have.

    Args:
        weights: the tensors of the file that the layer is
        is_exact: whether activations are never rounded to 8 bits
    """

    def __init__(self, weights: list[Weight], is_exact: bool) -> None:
        self.weights = weights
        self.is_exact = is_exact

    # What computes, for ``quantization.layers.kernel``.
    @property
    def kernel_name(self) -> str:
        return kernels.kernel(self.is_exact)


@register_weight_loader_v2_supported_method
class GGUFLinear(_Method, LinearMethodBase):  # type: ignore[misc]
    # Whether nothing but products needs the weights.
    only_multiplies = True

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        types = [weight.number(params_dtype) for weight in self.weights]
        weight = Packed(
            parts(types, output_partition_sizes, input_size_per_partition),
            weight_loader=extra_weight_attrs.pop("weight_loader"),
        )
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed = layer.weight
        if packed.is_meta:
            return  # the head of a model that is run for embeddings, which vLLM leaves out
        # A parameter for each part, so that none has to be cut out at each product.
        layer.packed = []
        for name, part in _named(packed.parts):
            rows = part.of(packed.data.flatten())
            is_repacked = self.only_multiplies and not self.is_exact
            type = kernels.repack(rows, part.type) if is_repacked else part.type
            layer.packed.append((name, type))
            setattr(layer, name, torch.nn.Parameter(rows, requires_grad=False))

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        packed = [(getattr(layer, name), type) for name, type in layer.packed]
        if len(packed) == 2 and not self.is_exact:
            product = kernels.pair(x, packed[0], packed[1], is_gated=False)
        else:
            products = [kernels.matmul(x, *each, self.is_exact) for each in packed]
            product = products[0] if len(products) == 1 else torch.cat(products, -1)
        return product if bias is None else product + bias


def _named(parts: list[Part]) -> Iterator[tuple[str, Part]]:
    for index, part in enumerate(parts):
        yield f"weight_{index}" if index else "weight", part


class GGUFEmbedding(GGUFLinear):
    """Of the embedding and of the head, which may be the same."""

    only_multiplies = False

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        ((name, type),) = layer.packed
        embedded: torch.Tensor = torch.ops.vllm_bridge.gguf_embed(
            input_, getattr(layer, name), type, layer.params_dtype
        )
        return embedded

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        # Whatever it is: it may be plain where a model does not ask for its method.
        layer.quant_method = embed_tokens.quant_method
        layer.weight = embed_tokens.weight
        return layer


def _embed(ids: torch.Tensor, weight: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    """The rows ``ids`` of a packed weight as numbers, [..., columns]."""
    return kernels.dequantize(weight[ids], type, dtype)


strips.operation(
    "gguf_embed(Tensor ids, Tensor weight, int type, ScalarType dtype)",
    _embed,
    lambda ids, weight, type, dtype: weight.new_empty(
        (*ids.shape, kernels.columns(weight, type)), dtype=dtype
    ),
)


class GGUFExperts(_Method, FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of a mixture, each packed; only those that tokens are sent to are computed.

    Args:
        gate_up: the tensors of the file for their gates and ups
        down: the one for their downs
    """

    def __init__(self, moe: Any, gate_up: list[Weight], down: list[Weight], is_exact: bool) -> None:
        _Method.__init__(self, [*gate_up, *down], is_exact)
        FusedMoEMethodBase.__init__(self, moe)
        self._gate_up, self._down = gate_up, down

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        inner = intermediate_size_per_partition
        self._parts = {
            "w13_weight": parts(
                [weight.number(params_dtype) for weight in self._gate_up], [inner] * 2, hidden_size
            ),
            "w2_weight": parts(
                [weight.number(params_dtype) for weight in self._down], [hidden_size], inner
            ),
        }
        for name, its_parts in self._parts.items():
            data = torch.empty(num_experts, its_parts[-1].end, dtype=torch.uint8)
            weight = torch.nn.Parameter(data, requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, {"weight_loader": _ExpertLoader(layer, its_parts)})

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: Any,
    ) -> torch.Tensor:
        result = torch.zeros_like(x, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            place = expert if layer.expert_map is None else int(layer.expert_map[expert])
            if place < 0:
                continue
            tokens, ranks = (topk_ids == expert).nonzero(as_tuple=True)
            inputs, scales = x[tokens], topk_weights[tokens, ranks].unsqueeze(-1)
            if layer.apply_router_weight_on_input:
                inputs, scales = inputs * scales.to(x.dtype), torch.ones_like(scales)
            both = self._product(layer, "w13_weight", place, inputs)
            inner = both.new_empty(len(both), both.shape[1] // 2)
            apply_moe_activation(layer.activation, inner, both)
            outputs = self._product(layer, "w2_weight", place, inner)
            result.index_add_(0, tokens, outputs * scales)
        return result.to(x.dtype)

    def _product(
        self, layer: RoutedExperts, name: str, expert: int, x: torch.Tensor
    ) -> torch.Tensor:
        data = getattr(layer, name)[expert]
        products = [
            kernels.matmul(x, part.of(data), part.type, self.is_exact) for part in self._parts[name]
        ]
        return products[0] if len(products) == 1 else torch.cat(products, -1)


class _ExpertLoader:
    """Fills the parameter of a layer's gates and ups, or of its downs."""

    def __init__(self, layer: RoutedExperts, parts: list[Part]) -> None:
        self._experts, self._config = layer.expert_map_manager, layer.moe_config
        self._parts = parts

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        place = self._experts.map_global_to_local(expert_id)
        if place < 0:
            return False if return_success else None
        rank, data = self._config.tp_rank, param.data[place]
        if shard_id == "w2":
            width = self._parts[0].width
            rows = as_bytes(loaded_weight).narrow(1, rank * width, width)
            load(data, self._parts, rows, 0)
        else:
            count = self._config.intermediate_size_per_partition
            rows = loaded_weight.narrow(0, rank * count, count)
            load(data, self._parts, rows, 0 if shard_id == "w1" else count)
        return True if return_success else None


def packed_names(model: torch.nn.Module) -> set[str]:
    """The names, on Hugging Face, of the tensors that a model holds packed."""
    return {
        weight.name
        for module in model.modules()
        if isinstance(method := getattr(module, "quant_method", None), _Method)
        for weight in method.weights
    }
