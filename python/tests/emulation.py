"""What engines compute in the place of vLLM's own kernels, in plain torch: for references of
methods that round more than the weights.

An engine that is started within one of these contexts, as a fork of this process, is changed for
its life.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

# The layers that vLLM makes one of.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Integers(NamedTuple):
    """The weights of a layer in eight bits.

    Args:
        values: a row for each output
        scales: one for each row; what they multiply the integers with is the method's affair
    """

    values: torch.Tensor
    scales: torch.Tensor


Compute = Callable[[torch.Tensor, Integers], torch.Tensor]


def weights_only(x: torch.Tensor, weights: Integers) -> torch.Tensor:
    """torchao's 8-bit weights: products and scales are rounded to the dtype of the inputs."""
    product = (x.double() @ weights.values.double().T).to(x.dtype)
    return product * weights.scales.to(x.dtype)


def dynamic(x: torch.Tensor, weights: Integers) -> torch.Tensor:
    """torchao's 8-bit activations: each token's scale is rounded to the dtype of the inputs, and
    the products are too before the weights' scales are applied."""
    scales = (x.abs().amax(1, keepdim=True) / 127.5).float()
    product = _times(_rounded(x, 1 / scales), weights) * scales
    return (product.to(x.dtype) * weights.scales).to(x.dtype)


def w8a8(x: torch.Tensor, weights: Integers) -> torch.Tensor:
    """compressed-tensors' INT8, each token by a scale of its own."""
    scales = x.float().abs().amax(1, keepdim=True) / 127
    return (_times(_rounded(x, 1 / scales), weights) * weights.scales * scales).to(x.dtype)


def llm_int8(x: torch.Tensor, weights: Integers) -> torch.Tensor:
    """bitsandbytes' LLM.int8(): columns with an outlier in any token are computed apart."""
    half = x.half()
    outliers = (half.abs() >= 6).any(0)
    regular = half.masked_fill(half.abs() >= 6, 0)
    largest = regular.float().abs().amax(1, keepdim=True)
    integers = _rounded(regular, 127 / largest).masked_fill(outliers, 0)
    # What it takes for 1 / 127**2.
    product = (_times(integers, weights) * (largest * weights.scales) * 6.200124e-05).to(x.dtype)
    if not outliers.any():
        return product
    columns = (weights.values[:, outliers] * (weights.scales[:, None] / 127)).to(x.dtype)
    return torch.addmm(product, x[:, outliers], columns.T)


def in_columns(x: torch.Tensor, weights: Integers) -> torch.Tensor:
    """Packed integers with activations in 8 bits: each 128 columns of a token have a scale. The
    weights are plain numbers, of which nothing is rounded."""
    return (by_columns(x, 128).double() @ weights.values.double().T).to(x.dtype)


def by_columns(x: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers that are rounded to 8 bits, so many columns at a time by the largest of them."""
    parts = x.float().unflatten(1, (-1, width))
    largest = parts.abs().amax(2, keepdim=True)
    # A number divided by a tensor would be its inverse first, and rounded twice.
    inverse = torch.tensor(127.0) / largest
    return ((parts * inverse).nan_to_num().round() * (largest / 127)).flatten(1)


def _rounded(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (x.float() * scales).round().clamp(-128, 127)


def _times(integers: torch.Tensor, weights: Integers) -> torch.Tensor:
    return (integers.double() @ weights.values.double().T).float()


@contextlib.contextmanager
def linear_layers(compute: Compute, weights: Mapping[str, Integers]) -> Iterator[None]:
    """Has linear layers computed in this way.

    Args:
        weights: those of each layer, by its name in the checkpoint; others are left as they are
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    own = UnquantizedLinearMethod.apply
    whole: dict[str, Integers] = {}

    def apply(method: Any, layer: Any, x: torch.Tensor, bias: None = None) -> Any:
        head, _, name = layer.prefix.rpartition(".")
        names = [f"{head}.{part}" for part in PARTS.get(name, (name,))]
        if names[0] not in weights:
            return own(method, layer, x, bias)
        assert bias is None
        if layer.prefix not in whole:
            parts = [weights[name] for name in names]
            whole[layer.prefix] = Integers(*map(torch.cat, zip(*parts, strict=True)))
        return compute(x, whole[layer.prefix])

    with _replaced(UnquantizedLinearMethod, "apply", apply):
        yield


def _nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of a smaller dtype that are nearest to these, of two as near the even one."""
    limits = torch.finfo(dtype)
    exact = x.double().clamp(limits.min, limits.max)
    size = exact.abs().clamp(min=limits.smallest_normal)
    step = 2.0 ** (torch.frexp(size).exponent - 1) * limits.eps
    return ((exact / step).round() * step).to(x.dtype)


@contextlib.contextmanager
def kv_cache(dtype: torch.dtype) -> Iterator[None]:
    """Has keys and values rounded to a dtype before they are cached as they are."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from vllm_bridge.patches.cpu import attention

    # Attention writes to the cache itself then.
    attention.apply()
    attend = CPUAttentionBackendImpl.forward

    # With what marks it as changed.
    @functools.wraps(attend)
    def rounded(
        self: Any, layer: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any
    ) -> Any:
        key, value = _nearest(key, dtype), _nearest(value, dtype)
        return attend(self, layer, query, key, value, *rest, **named)

    with _replaced(CPUAttentionBackendImpl, "forward", rounded):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
