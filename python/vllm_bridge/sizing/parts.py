"""The tensors of a checkpoint as they count: what each is of the model, by its name and shape."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vllm_bridge.checkpoints import gguf
from vllm_bridge.checkpoints.checkpoint import CAST, Checkpoint
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.quantization import registry
from vllm_bridge.sizing import layers

KINDS: Final = ("linear", "embeddings", "experts", "others")
NOT_KEPT: Final = "not kept"


class Part(NamedTuple):
    """A tensor as it counts.

    Args:
        name: of it, and of the first of those that are alike
        kind: one of ``KINDS``, as the fields of ``Weights`` are called, or ``NOT_KEPT``
        layer: of the model of text that it belongs to; None for what is outside of layers
        is_head: whether it belongs to the output layer
        in_tower: whether it is beside the model of text, for pictures or sound
        elements: how many weights it stands for
        alike: how many there are, which is one but for the experts of a layer
    """

    name: str
    tensor: Tensor
    kind: str
    layer: int | None
    is_head: bool
    in_tower: bool
    elements: int
    alike: int

    @property
    def is_quantizable(self) -> bool:
        """Whether methods quantize it in a plain model: a matrix of a layer that is no router's."""
        is_matrix = self.kind in ("linear", "experts") and len(self.tensor.shape) > 1
        return is_matrix and not ROUTER_OR_NORM.search(self.name)


# Words in the names of tensors. First what is beside the model of text.
_TOWER = re.compile(
    r"(^|[._])(vision|visual|image|audio|speech|mm|multi_?modal|connector|sam|clip)"
)
_EMBEDDING = re.compile(r"embed|lm_head|(^|\.)(wte|wpe)\.|^(model\.)?(output|shared)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.|^(model\.)?output\.weight$")
_EXPERT = re.compile(r"\.experts\.")
_NUMBER_OF_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h)\.(\d+)\.")
_DRAFT = re.compile(r"^(model\.)?mtp[._]")
_SHARED = re.compile(r"\.layers\.(\d+)\.shared_transformer\.")
_ORDER = re.compile(r"\.g_idx$")
_COMPUTED = re.compile(r"inv_freq$|rotary_emb|\.masked_bias$")
ROUTER_OR_NORM = re.compile(r"norm|(^|\.)ln_|router|\.gate\.|shared_expert_gate")
KEYS = re.compile(r"(^|\.)(k_proj|key|wk|k)\.")
VALUES = re.compile(r"(^|\.)(v_proj|value|wv|v)\.")
FUSED = re.compile(r"(^|\.)(qkv_proj|Wqkv|query_key_value|c_attn|qkv|attn_qkv)\.")

# What a packed layer consists of.
PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_shape|weight_scale\w*|weight_zero_point"
    r"|weight_g_idx|input_scale\w*|SCB|W_q|scale|zero|lookup_table|rows|cols|vals|full_rows"
    r"|full_row_indices|weight\.[\w.]+)$|_blocks$|_scales$"
)


class _Rules(NamedTuple):
    """What the parts depend on beside the tensors.

    Args:
        layers: of the whole model of text; 0 where that is not known
        has_draft: whether the layers after these are those of the draft
        is_tied: whether the embeddings are the output layer too
        bits: of each weight of a quantized model, as far as that is known
        blocks: of attention, which Zamba 2's layers take in turns
        is_ordered: whether the inputs of quantized layers are in an order of their own
    """

    layers: int
    has_draft: bool
    is_tied: bool
    bits: float | None
    blocks: int
    is_ordered: bool


def parts(checkpoint: Checkpoint, options: Mapping[str, Any]) -> tuple[Part, ...]:
    """The tensors of a checkpoint; those that no model keeps are ``NOT_KEPT``."""
    method = registry.meant_by(checkpoint.quant_method or "")
    scheme = method.scheme(checkpoint.quantization or {})
    config = layers.text_config(checkpoint.config)
    rules = _Rules(
        config.number("num_hidden_layers"),
        _uses_own_draft(options),
        is_tied(checkpoint),
        scheme.bits,
        config.number("num_mem_blocks") or 1,
        bool(scheme.desc_act),
    )
    return _parts(_Same(checkpoint.tensors), rules)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output layer is the embeddings: by the config, or because there is no other."""
    if layers.text_config(checkpoint.config).get("tie_word_embeddings") is True:
        return True
    return not _has_head(_Same(checkpoint.tensors))


class _Same:
    """Tensors as a key: many questions are asked of the same ones."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensors is self.tensors

    def __hash__(self) -> int:
        return id(self.tensors)


@functools.lru_cache(maxsize=4)
def _has_head(same: _Same) -> bool:
    return any(_HEAD.search(name) for name in same.tensors)


@functools.lru_cache(maxsize=4)
def _parts(same: _Same, rules: _Rules) -> tuple[Part, ...]:
    found: dict[tuple[str, str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, tensor in same.tensors.items():
        found[_NUMBER_OF_EXPERT.sub("", name), tensor.dtype, tensor.shape].append(name)
    sharing = {int(match[1]) for name in same.tensors if (match := _SHARED.search(name))}
    # Files may have a copy of a block for each of the layers that share it.
    copies = sorted(sharing)[rules.blocks :]
    return tuple(_part(names, same.tensors[names[0]], rules, copies) for names in found.values())


def _part(names: list[str], tensor: Tensor, rules: _Rules, copies: list[int]) -> Part:
    name = names[0]
    in_tower = _TOWER.search(name) is not None
    match = None if in_tower else _LAYER.search(name)
    layer = int(match[1]) if match else None
    is_head = _HEAD.search(name) is not None
    is_draft = _DRAFT.search(name) or (layer is not None and 0 < rules.layers <= layer)
    is_kept = (
        (rules.has_draft or not is_draft)
        and not (rules.is_tied and is_head)
        and not (layer in copies and _SHARED.search(name))
        and (rules.is_ordered or not _ORDER.search(name))
        and not _COMPUTED.search(name)
    )
    if not is_kept:
        kind = NOT_KEPT
    elif in_tower:
        kind = "others"
    elif _EXPERT.search(name):
        kind = "experts"
    elif _EMBEDDING.search(name):
        kind = "embeddings"
    elif PACKED.search(name) or len(tensor.shape) == 2:
        kind = "linear"
    else:
        kind = "others"
    elements = _elements(name, tensor, rules.bits)
    return Part(name, tensor, kind, layer, is_head, in_tower, elements, len(names))


def _uses_own_draft(options: Mapping[str, Any]) -> bool:
    """Whether the layers that predict further tokens are those of the draft."""
    speculative = options.get("speculative_config")
    return isinstance(speculative, dict) and str(speculative.get("method", "")).endswith("mtp")


def _elements(name: str, tensor: Tensor, bits: float | None) -> int:
    """How many weights a tensor stands for; none if it is no weight."""
    if tensor.dtype in CAST or tensor.dtype in gguf.READ:
        return math.prod(tensor.shape)
    each = {"F8_E4M3": 8, "I8": 8, "U8": 4, "I32": bits}.get(tensor.dtype)
    if not each or not name.endswith((".weight", ".qweight", ".weight_packed")):
        return 0
    return int(tensor.size * 8 / each)
