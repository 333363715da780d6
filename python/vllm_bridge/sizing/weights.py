"""What a model's weights take, on the disk and in the memory of each rank.

Everything is from the headers of its files: each tensor counts as what vLLM makes of it. That is
what is in the file, but for these:

- floats get the dtype that the model computes in; scales of 32 bits stay as they are
- a tied output layer, the layers of a draft that is not used (``num_nextn_predict_layers``), the
  order of GPTQ's inputs where it is the usual one, and computed tensors are not kept
- FP8 weights without a kernel, and GGUF's types without one, become floats
- packed weights whose layout vLLM changes, by their method's own words
  (``Method.bytes_per_weight``, ``Method.expert_multiples``)
- a plain model that is quantized while it is loaded, by ``Method.online_bytes``
- vLLM rounds vocabularies up to multiples of 64

On a CPU vLLM has its weights of the embeddings and of the output layer twice: once as they are and
once as its kernels want them (``UnquantizedEmbeddingMethod``).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vllm_bridge.checkpoints import gguf
from vllm_bridge.checkpoints.checkpoint import CAST, Checkpoint
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.quantization import registry
from vllm_bridge.quantization.method import Method
from vllm_bridge.sizing import layers, paging, parts, settings
from vllm_bridge.sizing.fields import Fields
from vllm_bridge.sizing.parts import Part


class Weights(NamedTuple):
    """Bytes of a model's weights.

    Args:
        disk: in its files, without headers
        memory: of all ranks together, once they are loaded
        peak: the same when it is most: where a model is quantized only once it is loaded, before
            that
        linear: of ``memory``, matrices of attention and of MLPs, and what belongs to them
        embeddings: of ``memory``, those of tokens and the output layer
        experts: of ``memory``, those of mixtures
        others: of ``memory``, norms, biases, and parts for pictures and sound
        per_rank: ``memory`` of each rank; those of a tensor parallel group, stage after stage
        read: of each rank, what is read for a token: all but the embeddings and the experts that
            it is not sent to
    """

    disk: int
    memory: int
    peak: int
    linear: int
    embeddings: int
    experts: int
    others: int
    per_rank: tuple[int, ...]
    read: tuple[int, ...]


# Of these each rank has all: norms, routers, and the way into a latent cache.
_REPLICATED = re.compile(
    rf"{parts.ROUTER_OR_NORM.pattern}|q_a_proj|kv_a_proj|wq_a|wkv_a|fused_qkv_a|position|wpe|indexer"
)

# Floats that stay as the file has them: scales, and tables of values.
_SCALE = re.compile(r"scale|absmax|quant_map|\.SCB$|nested|quant_state")

# GGUF's types that are floats once they are loaded.
_UNPACKED: Final = gguf.READ - gguf.KEPT - CAST

_VOCABULARY: Final = 64

# Of these the embeddings compute the output themselves, where a tied output layer of others has a
# copy of its own on CPUs.
_HEADLESS: Final = ("cohere", "cohere2", "gemma2", "gemma3n_text")

# What a weight takes at least where a plain model is quantized while it is loaded by a method of
# which nothing is known.
_ONLINE_LEAST: Final = 0.5


def weights(checkpoint: Checkpoint, options: Mapping[str, Any], kind: str = "cuda") -> Weights:
    """What the weights of a model take under these engine options.

    Args:
        checkpoint: whose ``tensors`` are known; without them all is 0
        options: by vLLM's names; those that count are ``dtype``, ``quantization`` and its settings,
            ``tensor_parallel_size``, ``pipeline_parallel_size``, ``data_parallel_size``,
            ``mm_encoder_tp_mode`` and ``speculative_config``
        kind: of the device: ``"cpu"``, or another
    """
    loaded = _Loaded.of(checkpoint, options, kind)
    sums = dict.fromkeys(parts.KINDS, 0.0)
    ranks = [0.0] * (loaded.tensor_ranks * loaded.stages)
    read = [0.0] * len(ranks)
    disk = peak = 0.0
    for part in parts.parts(checkpoint, options):
        disk += part.tensor.size * part.alike
        if part.kind == parts.NOT_KEPT:
            continue
        peak += loaded.peak(part) * part.alike
        size = loaded.memory(part) * loaded.share(part) * part.alike
        for stage in loaded.stages_of(part):
            first = stage * loaded.tensor_ranks
            for rank in range(first, first + loaded.tensor_ranks):
                ranks[rank] += size
                sums[part.kind] += size
                if stage == loaded.stage_read(part):
                    read[rank] += size * loaded.share_read(part)
    per_rank = tuple(math.ceil(size) for size in ranks)
    return Weights(
        disk=int(disk),
        memory=sum(per_rank),
        peak=math.ceil(peak),
        linear=math.ceil(sums["linear"]),
        embeddings=math.ceil(sums["embeddings"]),
        experts=math.ceil(sums["experts"]),
        others=math.ceil(sums["others"]),
        per_rank=per_rank,
        read=tuple(math.ceil(size) for size in read),
    )


def on_device(checkpoint: Checkpoint, options: Mapping[str, Any], kind: str) -> Weights:
    """What they take on a device of which no more is known than its kind: few processors have a
    kernel for FP8 or for packed experts."""
    if kind == "cpu":
        checkpoint = dataclasses.replace(
            checkpoint, is_dequantized=True, are_experts_dequantized=True
        )
    return weights(checkpoint, options, kind)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """How tensors become the weights of ranks.

    Args:
        width: bytes of a number of the dtype that the model computes in
        repacked: what becomes of a byte of a packed layer
        padded: the same of a packed expert
        online: what a weight takes that is quantized while the model is loaded, once that is done;
            None where none is
        online_peak: the same when it is most
        online_experts: whether experts are quantized too
        linear_dequantized: see ``Checkpoint``
        experts_dequantized: see ``Checkpoint``
        copies: of embeddings
        head_copies: of an output layer
        tied_copies: of embeddings that are the output layer too
        is_tied: whether the embeddings are the output layer too
        tensor_ranks: of tensor parallelism
        expert_ranks: that experts are divided among
        stages: of pipeline parallelism
        layers: of the whole model of text
        heads: of queries; 0 where that is not known
        key_heads: of keys and values; 0 where that is not known
        sent_to: the part of all experts that a token is sent to
        divides_tower: whether what is beside the model of text is divided among ranks
    """

    width: int
    repacked: float
    padded: float
    online: float | None
    online_peak: float | None
    online_experts: bool
    linear_dequantized: bool
    experts_dequantized: bool
    copies: int
    head_copies: int
    tied_copies: int
    is_tied: bool
    tensor_ranks: int
    expert_ranks: int
    stages: int
    layers: int
    heads: int
    key_heads: int
    sent_to: float
    divides_tower: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: Mapping[str, Any], kind: str) -> "_Loaded":
        config = layers.text_config(checkpoint.config)
        ranks = settings.count(options, "tensor_parallel_size")
        width = settings.itemsize(options)
        method = _online_method(checkpoint, options)
        online = peak = None
        if method is not None and width == 2:
            online, peak = (
                method.online_memory(checkpoint, options),
                method.online_bytes(checkpoint, options),
            )
            online = _ONLINE_LEAST if online is None else online
            peak = online if peak is None else peak
        experts, chosen = layers.experts(config), layers.experts_per_token(config)
        copies = 2 if kind == "cpu" and checkpoint.load_format != "gguf" else 1
        has_head = config["model_type"] not in _HEADLESS
        has_copy = registry.meant_by(checkpoint.quant_method or "").copies_head
        return cls(
            width=width,
            repacked=_repacked(checkpoint),
            padded=1.0 if kind == "cpu" else _padded(checkpoint, config, ranks),
            online=online,
            online_peak=peak,
            online_experts=method is not None
            and not method.experts_note
            and method.no_online_experts is None,
            linear_dequantized=checkpoint.is_dequantized,
            experts_dequantized=checkpoint.are_experts_dequantized,
            copies=copies,
            head_copies=copies if has_copy else 1,
            tied_copies=copies + int(has_head and has_copy and copies > 1),
            is_tied=parts.is_tied(checkpoint),
            tensor_ranks=ranks,
            expert_ranks=ranks * settings.count(options, "data_parallel_size"),
            stages=settings.count(options, "pipeline_parallel_size"),
            layers=layers.count(config),
            heads=layers.query_heads(config),
            key_heads=layers.key_heads(config),
            sent_to=min(chosen / experts, 1.0) if chosen and experts else 1.0,
            divides_tower=options.get("mm_encoder_tp_mode") != "data",
        )

    def memory(self, part: Part) -> float:
        """Bytes of a tensor in a model that is not divided."""
        return self._size(part, self.online)

    def peak(self, part: Part) -> float:
        return self._size(part, self.online_peak)

    def _size(self, part: Part, online: float | None) -> float:
        name, tensor = part.name, part.tensor
        is_experts = part.kind == "experts"
        if tensor.dtype in gguf.KEPT:
            return tensor.size
        if is_experts and self.experts_dequantized and part.elements:
            return part.elements * self.width
        is_float = tensor.dtype in CAST
        if tensor.dtype in _UNPACKED:
            return part.elements * self.width
        if self.linear_dequantized and not is_experts and _is_fp8(name, tensor):
            return part.elements * self.width
        if part.kind in ("linear", "experts") and (parts.PACKED.search(name) or not is_float):
            return tensor.size * self.repacked * (self.padded if is_experts else 1.0)
        if not is_float or (tensor.dtype == "F32" and _SCALE.search(name)):
            return tensor.size
        elements = part.elements
        if online is not None and self._is_quantized_online(part):
            return elements * online
        if part.kind == "embeddings" and len(tensor.shape) == 2:
            rows, columns = tensor.shape
            padded = math.ceil(rows / _VOCABULARY) * _VOCABULARY
            elements = padded * columns * self._copies(part)
        return elements * self.width

    def _copies(self, part: Part) -> int:
        if part.is_head:
            return self.head_copies
        return self.tied_copies if self._is_output(part) else self.copies

    def _is_output(self, part: Part) -> bool:
        """Whether these embeddings are the output layer too. Those of single layers are not."""
        return self.is_tied and not part.is_head and "per_layer" not in part.name

    def _is_quantized_online(self, part: Part) -> bool:
        return part.is_quantizable and (self.online_experts or part.kind != "experts")

    def share(self, part: Part) -> float:
        """The part of it that each rank of its stage has."""
        ranks, name = self.tensor_ranks, part.name
        if part.kind == "experts":
            return 1 / self.expert_ranks
        if part.in_tower:
            return 1 / ranks if self.divides_tower and len(part.tensor.shape) == 2 else 1.0
        if _REPLICATED.search(name) or (part.kind == "others" and len(part.tensor.shape) < 2):
            return 1.0
        if self.key_heads and self.heads:
            keys = max(1, self.key_heads // ranks)  # which ranks share where there are fewer
            if parts.KEYS.search(name) or parts.VALUES.search(name):
                return keys / self.key_heads
            if parts.FUSED.search(name):
                every = self.heads + 2 * self.key_heads
                return (self.heads / ranks + 2 * keys) / every
        return 1 / ranks

    def stages_of(self, part: Part) -> list[int]:
        """The stages that have it."""
        if self.stages == 1:
            return [0]
        last = self.stages - 1
        if part.layer is not None:
            return [self._stage(part.layer)]
        if part.in_tower:
            return list(range(self.stages))
        if part.kind == "embeddings" and not part.is_head:
            return sorted({0, last}) if self.is_tied else [0]
        return [last]

    def stage_read(self, part: Part) -> int:
        """The one of them that reads it for each token."""
        return self.stages_of(part)[-1]

    def share_read(self, part: Part) -> float:
        """How much of it is read for a token."""
        if part.kind == "experts":
            return self.sent_to
        if part.in_tower:
            return 0.0
        if part.kind == "embeddings":
            is_read = part.is_head or self._is_output(part)
            return 1 / self._copies(part) if is_read else 0.0
        return 1.0

    def _stage(self, layer: int) -> int:
        shares = enumerate(paging.shares(self.layers, self.stages))
        return next((stage for stage, share in shares if layer in share), self.stages - 1)


def _online_method(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Method | None:
    name = options.get("quantization")
    if not isinstance(name, str) or checkpoint.quantization is not None:
        return None
    return registry.of(name)


def _repacked(checkpoint: Checkpoint) -> float:
    config = checkpoint.quantization
    if config is None or checkpoint.load_format == "gguf":
        return 1.0
    try:
        each = registry.meant_by(checkpoint.quant_method or "").bytes_per_weight(config)
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return 1.0  # what is wrong with a config is told elsewhere
    return 1.0 if each is None else each.memory / each.disk


def _padded(checkpoint: Checkpoint, config: Fields, ranks: int) -> float:
    """How much larger experts become because kernels want multiples of their sizes."""
    inputs = config.number("hidden_size")
    own = config.number("moe_intermediate_size", "intermediate_size") / ranks
    if not inputs or not own:
        return 1.0
    multiples = registry.meant_by(checkpoint.quant_method or "").expert_multiples
    sizes = zip((inputs, own), multiples, strict=True)
    return math.prod(math.ceil(size / multiple) * multiple / size for size, multiple in sizes)


def _is_fp8(name: str, tensor: Tensor) -> bool:
    return tensor.dtype == "F8_E4M3" and name.endswith(".weight")
