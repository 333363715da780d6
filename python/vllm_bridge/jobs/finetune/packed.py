"""Linear layers whose weights stay as AWQ and GPTQ have packed them, for training over them.

transformers loads such models with gptqmodel only, which contradicts vLLM's packages. These layers
compute exactly what the checkpoint says (integers, scales and zero points), forwards and backwards;
they have nothing that is trained. Needs torch and transformers, and not vLLM.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_bridge.quantization.gptq import format as gptq
from vllm_bridge.quantization.packed import grouped

# What transformers knows these layers by.
METHOD = "vllm_bridge_packed"

_AWQ_BITS = 4

# The output that each four bits of a word of AWQ's are of, lowest first, as a place in the word.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class _Multiply(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, x: torch.Tensor, layer: "PackedLinear") -> torch.Tensor:
        context.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ context.layer.dequantize(gradient.dtype), None


class PackedLinear(torch.nn.Linear):  # type: ignore[misc]
    """A linear layer that is frozen and packed. It is one of torch's, so that peft puts its
    adapters on it; ``weight`` is made anew each time that it is asked for.

    Args:
        layout: how integers are stored, with ``is_awq``, ``bits``, ``group_size``,
            ``is_symmetric``, ``is_ordered`` (there is a ``g_idx``) and the ``format``
    """

    def __init__(self, columns: int, rows: int, has_bias: bool, layout: Mapping[str, Any]) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = columns, rows
        self.is_awq, self.bits = layout["is_awq"], layout["bits"]
        self.settings = gptq.Settings(
            bits=self.bits,
            group_size=layout["group_size"],
            is_ordered=layout["is_ordered"],
            is_symmetric=layout["is_symmetric"] and not self.is_awq,
            stores_zeros=gptq.STORES_ZEROS.get(layout["format"], False),
        )
        groups, packed = self.settings.groups(columns), rows * self.bits // 32
        words = (columns, packed) if self.is_awq else (columns * self.bits // 32, rows)
        self.register_buffer("qweight", torch.zeros(words, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, rows, dtype=torch.float16))
        self.register_buffer("qzeros", torch.zeros(groups, packed, dtype=torch.int32))
        if self.settings.is_ordered:
            self.register_buffer("g_idx", torch.zeros(columns, dtype=torch.int32))
        bias = torch.zeros(rows) if has_bias else None
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def pack(self) -> None:
        """Makes of the checkpoint's tensors what products are computed with; they are dropped."""
        inputs = None
        if self.is_awq:
            packed = grouped.pack(_awq(self.qweight).T.contiguous(), self.bits)
            zeros = _awq(self.qzeros).T
        else:
            packed = gptq.rows(self.qweight, self.settings)
            zeros = gptq.zeros(self.qzeros, self.settings)
            inputs = gptq.order(self.g_idx) if self.settings.is_ordered else None
            if inputs is not None:
                packed = gptq.reorder(packed, self.bits, inputs)
        scales = self.scales.T.float().contiguous()
        for name in (
            "qweight",
            "qzeros",
            "scales",
            *(["g_idx"] if self.settings.is_ordered else []),
        ):
            delattr(self, name)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("values", scales, persistent=False)
        self.register_buffer("zeros", zeros.to(scales).contiguous(), persistent=False)
        self.register_buffer("inputs", inputs, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.dequantize(torch.float32)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights as plain numbers, rows times columns."""
        plain = grouped.dequantize(
            self.packed, self.values, self.zeros, self.bits, self.in_features, dtype
        )
        return plain if self.inputs is None else plain[:, torch.argsort(self.inputs)]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.inputs is None else x[..., self.inputs]
        return grouped.matmul(x, self.packed, self.values, self.zeros, self.bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Multiply.apply(x, self)
        return product if self.bias is None else product + self.bias.to(product)


def _awq(words: torch.Tensor) -> torch.Tensor:
    """The integers in AWQ's words: a row for each input, a column for each output."""
    numbers = words.unsqueeze(-1) >> torch.arange(0, 32, _AWQ_BITS, dtype=torch.int32) & 15
    return numbers[..., list(_AWQ_ORDER)].flatten(1).to(torch.uint8)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What transformers is told of such a model.

    Args:
        layout: as ``PackedLinear`` has it
        modules: the names of the layers that are packed
    """

    def __init__(self, layout: Mapping[str, Any], modules: list[str], **_: Any) -> None:
        self.quant_method = METHOD
        self.layout = dict(layout)
        self.modules = modules


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Has transformers load such a model."""

    requires_calibration = True

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        packed = set(self.quantization_config.modules)
        for name, module in list(model.named_modules()):
            if name in packed:
                with torch.device("meta"):
                    layer = PackedLinear(
                        module.in_features,
                        module.out_features,
                        module.bias is not None,
                        self.quantization_config.layout,
                    )
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, layer)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.pack()
        return model
