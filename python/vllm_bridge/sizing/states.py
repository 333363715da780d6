"""The states that layers without attention keep of a sequence, whatever its length: of Mamba, of
linear attention and of short convolutions.

The shapes are those of ``MambaStateShapeCalculator`` (vLLM 0.32, ``model_executor/layers/mamba/
mamba_utils.py``), with the entries of a config that each model hands to it
(``get_mamba_state_shape_from_config``).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class State(NamedTuple):
    """The state of one layer, in numbers.

    Args:
        convolution: the last inputs of its convolution
        recurrent: what the layer carries on
        dtype: of ``recurrent``, where the model says it, else None for that of ``convolution``
        groups: that are in the state of the convolution as well; more ranks than groups have copies
        group_size: numbers in each of them
        blocks: pages that vLLM keeps beside the first two of a sequence for its prefix cache
    """

    convolution: int
    recurrent: int
    dtype: str | None = None
    groups: int = 0
    group_size: int = 0
    blocks: int = 0

    def bytes(self, ranks: int, itemsize: int, recurrent_itemsize: int) -> int:
        """On one of ``ranks`` tensor-parallel ranks."""
        groups = self.groups if self.groups % ranks == 0 else self.groups + ranks - self.groups
        convolution = (self.convolution + groups * self.group_size) // ranks
        return convolution * itemsize + self.recurrent // ranks * recurrent_itemsize


def of(text: Mapping[str, Any]) -> State | None:
    """The state of the layers that have one; None for a model without such layers.

    Args:
        text: what ``layers.text_config`` returns
    """
    model_type = text["model_type"]
    hidden = int(text.get("hidden_size") or 0)
    if model_type == "jamba":
        inner = int(text.get("mamba_expand") or 2) * hidden
        return _mamba(
            inner, int(text.get("mamba_d_state") or 16), int(text.get("mamba_d_conv") or 4)
        )
    if model_type in ("mamba", "falcon_mamba"):
        inner = int(text.get("intermediate_size") or int(text.get("expand") or 2) * hidden)
        return _mamba(inner, int(text.get("state_size") or 16), int(text.get("conv_kernel") or 4))
    if model_type == "mamba2":
        heads, size = int(text["num_heads"]), int(text["head_dim"])
        inner = int(text.get("expand") or 2) * hidden
        return _mamba2(text, inner, heads, size, "n_groups", "state_size", "conv_kernel")
    if model_type == "zamba2":
        inner = int(text.get("mamba_expand") or 2) * hidden
        heads = int(text.get("n_mamba_heads") or 8)
        size = int(text.get("mamba_headdim") or inner // heads)
        return _mamba2(text, inner, heads, size, "mamba_ngroups", "mamba_d_state", "mamba_d_conv")
    if model_type == "nemotron_h":
        heads, size = int(text["mamba_num_heads"]), int(text["mamba_head_dim"])
        state = _mamba2(
            text, heads * size, heads, size, "n_groups", "ssm_state_size", "conv_kernel"
        )
        return state._replace(dtype=str(text.get("mamba_ssm_cache_dtype") or "float32"))
    if model_type in ("bamba", "falcon_h1", "granitemoehybrid"):
        inner = int(text.get("mamba_d_ssm") or int(text.get("mamba_expand") or 2) * hidden)
        heads = int(text["mamba_n_heads"])
        found = text.get("mamba_d_head")
        size = found if isinstance(found, int) else inner // heads
        return _mamba2(text, inner, heads, size, "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    if "linear_num_value_heads" in text:
        return _gated_delta_net(text)
    if model_type.startswith("lfm2"):
        width = int(text.get("conv_dim") or hidden) if model_type == "lfm2" else hidden
        return State((int(text.get("conv_L_cache") or 3) - 1) * width, 0)
    if found := text.get("linear_attn_config"):
        # Kimi's delta attention, whose recurrent state is always in float32.
        heads, size = int(found["num_heads"]), int(found["head_dim"])
        kernel = int(found.get("short_conv_kernel_size") or 4)
        return State((kernel - 1) * 3 * heads * size, heads * size * size, "float32")
    if model_type.startswith("minimax") and ("attn_type_list" in text or "layer_types" in text):
        # Lightning attention (vLLM up to 0.22).
        heads = int(text["num_attention_heads"])
        size = int(text.get("head_dim") or hidden // heads)
        return State(0, heads * size * size)
    return None


def _mamba(inner: int, state_size: int, kernel: int) -> State:
    return State((kernel - 1) * inner, inner * state_size)


def _mamba2(
    text: Mapping[str, Any],
    inner: int,
    heads: int,
    head_size: int,
    groups: str,
    state_size: str,
    kernel: str,
) -> State:
    """
    Args:
        groups: the name of its entry in the config, as are ``state_size`` and ``kernel``
    """
    size, length = int(text.get(state_size) or 128), int(text.get(kernel) or 4) - 1
    return State(
        convolution=length * inner,
        recurrent=heads * head_size * size,
        groups=int(text.get(groups) or 1),
        group_size=length * 2 * size,
        # ``MambaMixer2.get_kv_cache_spec``
        blocks=1,
    )


def _gated_delta_net(text: Mapping[str, Any]) -> State:
    keys = int(text["linear_num_key_heads"]) * int(text["linear_key_head_dim"])
    values = int(text["linear_num_value_heads"]) * int(text["linear_value_head_dim"])
    dtype = text.get("mamba_ssm_dtype")
    return State(
        convolution=(int(text.get("linear_conv_kernel_dim") or 4) - 1) * (2 * keys + values),
        recurrent=values * int(text["linear_key_head_dim"]),
        dtype=dtype if isinstance(dtype, str) else None,
    )
