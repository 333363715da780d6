"""Layers of vLLM whose weights are the packed rows of a GGUF file, as vLLM fills and computes them,
whole and divided among ranks, against gguf-py's dequantization of the same rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch

from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization.methods.gguf import GGUF

HIDDEN, HEADS, KEYS, HEAD, INNER, VOCABULARY = 512, 4, 2, 32, 512, 100


class Matrix:
    """Random rows of a type: as a file has them, and as gguf-py dequantizes them."""

    def __init__(self, type: str, *shape: int) -> None:
        kind = reference.GGMLQuantizationType[type]
        values = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
        if type in ("Q4_K", "Q6_K"):  # which gguf-py only reads
            packed = _blocks(kind, shape)
        else:
            packed = reference.quants.quantize(values, kind)
        self.type = type
        self.rows = torch.from_numpy(packed)
        self.values = torch.from_numpy(reference.quants.dequantize(packed, kind))


def _blocks(kind: Any, shape: tuple[int, ...]) -> Any:
    """Blocks of random integers, whose scales are small numbers."""
    weights, size = reference.GGML_QUANT_SIZES[kind]
    numbers = np.random.default_rng(size)
    blocks = numbers.integers(0, 256, (*shape[:-1], shape[-1] // weights, size), np.uint8)
    scales = [0, 2] if kind == reference.GGMLQuantizationType.Q4_K else [size - 2]
    for place in scales:
        halves = numbers.uniform(1e-4, 1e-3, (*blocks.shape[:-1], 1)).astype(np.float16)
        blocks[..., place : place + 2] = halves.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


@contextmanager
def rank(number: int, count: int) -> Iterator[None]:
    """One of several ranks, as far as layers ask."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    group = SimpleNamespace(rank_in_group=number, world_size=count)
    before, parallel_state._TP = parallel_state._TP, group
    try:
        # What vLLM has compiled for several ranks takes half a minute.
        eager = torch.compiler.set_stance("force_eager")
        with eager, set_current_vllm_config(VllmConfig()), torch.no_grad():
            yield
    finally:
        parallel_state._TP = before


def config(**matrices: Matrix) -> Any:
    """vLLM's, of a file with these tensors."""
    from vllm_bridge.quantization.gguf.layers import GGUFConfig

    made = GGUFConfig()
    made.is_exact = True
    made.types = {f"{name}.weight": matrix.type for name, matrix in matrices.items()}
    made._hf_names = {name: name for name in made.types}
    made._embedding = made._head = "embed_tokens.weight"
    made.packed_modules_mapping = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}
    return made


def filled(layer: Any, **tensors: Any) -> Any:
    """A layer that has been given tensors, by their shards."""
    loader = layer.weight.weight_loader
    for shard, rows in tensors.items():
        keys = {"whole": (), "gate": (0,), "up": (1,)}.get(shard, (shard,))
        loader(layer.weight, rows, *keys)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def inputs(columns: int) -> torch.Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(1))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("types", [("Q8_0", "Q8_0", "Q8_0"), ("Q4_K", "Q4_K", "Q6_K")])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_queries_keys_and_values(types: tuple[str, str, str], count: int) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    rows = {"q": HEADS * HEAD, "k": KEYS * HEAD, "v": KEYS * HEAD}
    parts = {n: Matrix(t, rows[n], HIDDEN) for n, t in zip("qkv", types, strict=True)}
    x = inputs(HIDDEN)
    for number in range(count):
        with rank(number, count):
            layer = QKVParallelLinear(
                HIDDEN, HEAD, HEADS, KEYS, False,
                quant_config=config(**parts), prefix="qkv", return_bias=False,
            )  # fmt: skip
            filled(layer, **{name: matrix.rows for name, matrix in parts.items()})
            # With more ranks than keys, some have the same.
            keys = min(count, KEYS)
            of = {"q": (number, count), "k": (number * keys // count, keys)}
            of["v"] = of["k"]
            expected = [
                (x @ parts[name].values.T).chunk(chunks, -1)[place]
                for name, (place, chunks) in of.items()
            ]
            same(layer(x), torch.cat(expected, -1))
            assert len(layer.packed) == len(set(types))


@pytest.mark.parametrize("count", [1, 2])
def test_gate_up_and_down(count: int) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    gate, up = Matrix("Q8_0", INNER, HIDDEN), Matrix("Q4_0", INNER, HIDDEN)
    down = Matrix("Q4_K", HIDDEN, INNER)
    x, inner = inputs(HIDDEN), inputs(INNER)
    total = torch.zeros(len(x), HIDDEN)
    for number in range(count):
        with rank(number, count):
            merged = MergedColumnParallelLinear(
                HIDDEN, [INNER, INNER], False,
                quant_config=config(gate=gate, up=up), prefix="gate_up", return_bias=False,
            )  # fmt: skip
            filled(merged, gate=gate.rows, up=up.rows)
            expected = [(x @ matrix.values.T).chunk(count, -1)[number] for matrix in (gate, up)]
            same(merged(x), torch.cat(expected, -1))
            row = RowParallelLinear(
                INNER, HIDDEN, False, reduce_results=False,
                quant_config=config(down=down), prefix="down", return_bias=False,
            )  # fmt: skip
            total += filled(row, whole=down.rows)(inner.chunk(count, -1)[number])
    same(total, inner @ down.values.T)


@pytest.mark.parametrize(
    ("gate", "is_exact", "is_joined"),
    [("Q4_K", False, True), ("Q4_K", True, False), ("Q8_0", False, False)],
)
def test_what_is_gated_is_one_call_where_activations_are_rounded_and_each_product_is_one(
    gate: str, is_exact: bool, is_joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.qwen2 import Qwen2MLP

    from vllm_bridge.quantization.gguf import joined, kernels

    parts = {
        "gate": Matrix(gate, INNER, HIDDEN),
        "up": Matrix("Q4_K", INNER, HIDDEN),
        "down": Matrix("Q6_K", HIDDEN, INNER),
    }
    x = inputs(HIDDEN)
    with rank(0, 1):
        made = config(**{f"mlp.{name}_proj": matrix for name, matrix in parts.items()})
        made.is_exact = is_exact
        made.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
        model = torch.nn.Module()
        model.mlp = mlp = Qwen2MLP(HIDDEN, INNER, "silu", made, "mlp")
        filled(mlp.gate_up_proj, gate=parts["gate"].rows, up=parts["up"].rows)
        filled(mlp.down_proj, whole=parts["down"].rows)
        before = mlp(x)
        joined.join(model)
        products = _count(monkeypatch, kernels)
        found = mlp(x)
    assert (products == []) == is_joined
    inner = torch.nn.functional.silu(x @ parts["gate"].values.T) * (x @ parts["up"].values.T)
    expected = inner @ parts["down"].values.T
    for product in (before, found):
        assert (product - expected).norm() < 0.02 * expected.norm()
    # ggml's SiLU is not torch's, to the last bit.
    assert (found - before).norm() < 1e-3 * expected.norm()


def decoder_layer(parts: dict[str, Matrix], bias: bool) -> Any:
    """vLLM's layer of a Llama, whose attention mixes nothing, with its matrices of a file."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.models import llama

    made = config(**{f"{name}_proj": matrix for name, matrix in parts.items()})
    made.is_exact = False
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    class Attention(torch.nn.Module):  # type: ignore[misc]
        forward = llama.LlamaAttention.forward
        q_size, kv_size = HEADS * HEAD, KEYS * HEAD

        def rotary_emb(self, _positions: Any, q: Any, k: Any) -> Any:
            return q, k

        def attn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return q + torch.cat([k, v], -1)

    class Layer(torch.nn.Module):  # type: ignore[misc]
        forward = llama.LlamaDecoderLayer.forward

    layer: Any = Layer()
    layer.self_attn = attention = Attention()
    attention.qkv_proj = QKVParallelLinear(
        HIDDEN, HEAD, HEADS, KEYS, bias, quant_config=made, prefix="qkv_proj"
    )
    attention.o_proj = RowParallelLinear(
        HEADS * HEAD, HIDDEN, False, quant_config=made, prefix="o_proj"
    )
    layer.mlp = llama.LlamaMLP(HIDDEN, INNER, "silu", made)
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = RMSNorm(HIDDEN)
        norm.weight.data = 0.5 + torch.arange(HIDDEN) / HIDDEN
        setattr(layer, name, norm)
    filled(attention.qkv_proj, **{name: parts[name].rows for name in "qkv"})
    if bias:
        attention.qkv_proj.bias.data = torch.arange(2 * HEADS * HEAD) / HIDDEN
    filled(attention.o_proj, whole=parts["o"].rows)
    filled(layer.mlp.gate_up_proj, gate=parts["gate"].rows, up=parts["up"].rows)
    filled(layer.mlp.down_proj, whole=parts["down"].rows)
    return layer


@pytest.mark.parametrize(
    ("value", "bias", "is_compiled"),
    [("Q6_K", True, False), ("Q4_K", False, True), ("Q4_K", False, False), ("Q4_0", True, False)],
)
def test_products_are_one_call_with_the_norm_before_them_and_the_product_before_that(
    value: str, bias: bool, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_bridge.quantization.gguf import joined, kernels, operation

    if operation.library() is None:
        pytest.skip("there is no C++ compiler")
    rows = {"q": HEADS * HEAD, "k": KEYS * HEAD, "v": KEYS * HEAD, "o": HIDDEN}
    rows |= {"gate": INNER, "up": INNER, "down": HIDDEN}
    columns = {"o": HEADS * HEAD, "down": INNER}
    parts = {
        name: Matrix({"v": value, "o": "Q4_0"}.get(name, "Q4_K"), count, columns.get(name, HIDDEN))
        for name, count in rows.items()
    }
    x, residual = inputs(HIDDEN), 3 * inputs(HIDDEN).flip(0)
    with rank(0, 1):
        layer = decoder_layer(parts, bias)
        expected = [layer(None, x, residual), layer(None, x, None)]
        joined.join(layer)
        calls = _count(monkeypatch, kernels)
        run = torch.compile(layer, backend="eager", fullgraph=True) if is_compiled else layer
        found = [run(None, x, residual), run(None, x, None)]
    # The first layer of a model has no residual.
    assert is_compiled or len(calls) == (1 if value == "Q4_K" else 0)
    for both, others in zip(found, expected, strict=True):
        for one, other in zip(both, others, strict=True):
            assert (one - other).norm() < 0.01 * other.norm()


def test_tensors_of_another_size_than_the_layers_are_refused() -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    gate, up = Matrix("Q8_0", INNER, HIDDEN), Matrix("Q8_0", INNER, HIDDEN)
    down = Matrix("Q8_0", HIDDEN, INNER)
    with rank(0, 1):
        half = INNER // 2
        merged = MergedColumnParallelLinear(
            HIDDEN, [half, half], False,
            quant_config=config(gate=gate, up=up), prefix="gate_up", return_bias=False,
        )  # fmt: skip
        with pytest.raises(ValueError, match=f"it has {INNER} rows, the layer {half}"):
            filled(merged, gate=gate.rows)
        row = RowParallelLinear(
            half, HIDDEN, False, reduce_results=False,
            quant_config=config(down=down), prefix="down", return_bias=False,
        )  # fmt: skip
        with pytest.raises(ValueError, match="bytes in a row"):
            filled(row, whole=down.rows)


def test_tensors_that_are_one_in_the_file_are_divided() -> None:
    """Phi-3's."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    both = Matrix("Q8_0", 2 * INNER, HIDDEN)
    x = inputs(HIDDEN)
    with rank(1, 2):
        made = config(gate_up=both)
        made.packed_modules_mapping = {}
        layer = MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], False,
            quant_config=made, prefix="gate_up", return_bias=False,
        )  # fmt: skip
        filled(layer, whole=both.rows)
        gate, up = (x @ both.values.T).chunk(2, -1)
        same(layer(x), torch.cat([gate.chunk(2, -1)[1], up.chunk(2, -1)[1]], -1))


def test_rows_are_laid_out_for_the_kernel_in_the_place_where_they_are() -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    gate, up = Matrix("Q4_0", INNER, HIDDEN), Matrix("Q6_K", INNER, HIDDEN)
    x = inputs(HIDDEN)
    with rank(0, 1):
        made = config(gate=gate, up=up)
        made.is_exact = False
        layer = MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], False,
            quant_config=made, prefix="gate_up", return_bias=False,
        )  # fmt: skip
        filled(layer, gate=gate.rows, up=up.rows)
        found, expected = layer(x), torch.cat([x @ gate.values.T, x @ up.values.T], -1)
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert not torch.equal(found, expected)
    sizes = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
             for weight in layer.parameters()}  # fmt: skip
    assert sum(sizes.values()) == gate.rows.numel() + up.rows.numel()


@pytest.mark.parametrize("type", ["F16", "BF16", "F32", "MXFP4"])
def test_tensors_without_a_kernel_beside_packed_ones(type: str) -> None:
    """Plain ones come as they are, and others as numbers of the dtype that the model computes in,
    here of 32 bits."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    gate, up = Matrix("Q4_0", INNER, HIDDEN), Matrix(type, INNER, HIDDEN)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(type, torch.float32)
    x = inputs(HIDDEN)
    with rank(0, 1):
        layer = MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], False,
            quant_config=config(gate=gate, up=up), prefix="gate_up", return_bias=False,
        )  # fmt: skip
        filled(layer, gate=gate.rows, up=up.values.to(dtype))
        same(layer(x), torch.cat([x @ gate.values.T, x @ up.values.T], -1))


@pytest.mark.parametrize("count", [1, 2])
def test_embeddings_and_heads_that_are_tied(count: int) -> None:
    """Also of models that make the embedding without the config."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    from vllm_bridge.patches import embeddings

    embeddings.apply()
    matrix = Matrix("Q8_0", VOCABULARY, HIDDEN)
    x, ids = inputs(HIDDEN), torch.tensor([3, VOCABULARY - 1, 0])
    found, logits = torch.zeros(len(ids), HIDDEN), []
    for number in range(count):
        with rank(number, count):
            made = get_current_vllm_config().quant_config = config(embed_tokens=matrix)
            embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, reduce_results=False)
            head = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=made, prefix="lm_head")
            head = head.tie_weights(embedding)
            filled(embedding, whole=matrix.rows)
            head.quant_method.process_weights_after_loading(head)
            assert head.weight.data_ptr() == embedding.weight.data_ptr()
            found += embedding(ids)
            logits.append(head.quant_method.apply(head, x))
    assert torch.equal(found, matrix.values[ids])
    everything = torch.cat(logits, -1)
    same(everything[:, :VOCABULARY], x @ matrix.values.T)
    # What fills up the vocabulary is nothing.
    assert not everything[:, VOCABULARY:].any()


@pytest.mark.parametrize("count", [1, 2])
def test_experts_that_tokens_are_sent_to(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_bridge.quantization.gguf import kernels, layers

    experts, top = 4, 2
    gate, up = (Matrix(type, experts, INNER, HIDDEN) for type in ("Q4_0", "Q8_0"))
    down = Matrix("Q4_K", experts, HIDDEN, INNER)
    x = inputs(HIDDEN)
    ids = torch.tensor([[0, 2], [2, 3], [0, 3], [3, 2], [2, 0]], dtype=torch.int32)
    scales = torch.rand(len(x), top)
    computed = _count(monkeypatch, kernels)
    total = torch.zeros_like(x)
    for number in range(count):
        layer = _experts_layer(number, count)
        method = layers.GGUFExperts(
            layer.moe_config,
            [layers.Weight("gate", gate.type), layers.Weight("up", up.type)],
            [layers.Weight("down", down.type)],
            is_exact=True,
        )
        method.create_weights(layer, experts, HIDDEN, INNER // count, torch.float32)
        for expert in range(experts):
            for shard, matrix in (("w1", gate), ("w2", down), ("w3", up)):
                weight = layer.w2_weight if shard == "w2" else layer.w13_weight
                rows = matrix.rows[expert]
                assert weight.weight_loader(weight, rows, "", shard, expert, True) is True
        total += method.apply(layer, x, scales, ids, None, None)
    expected = torch.zeros_like(x)
    for token, (chosen, weighted) in enumerate(zip(ids, scales, strict=True)):
        for expert, scale in zip(chosen.tolist(), weighted, strict=True):
            hidden = torch.nn.functional.silu(gate.values[expert] @ x[token])
            hidden *= up.values[expert] @ x[token]
            expected[token] += scale * (down.values[expert] @ hidden)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-2 * float(expected.abs().max()))
    # Nothing was sent to the second: three experts, with gate, up and down.
    assert len(computed) == count * 3 * 3


def _experts_layer(number: int, count: int) -> Any:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    layer = torch.nn.Module()
    layer.moe_config = SimpleNamespace(
        tp_rank=number, intermediate_size_per_partition=INNER // count
    )
    layer.expert_map_manager = SimpleNamespace(map_global_to_local=lambda expert: expert)
    layer.expert_map, layer.apply_router_weight_on_input = None, False
    layer.activation = MoEActivation.SILU
    return layer


def _count(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> list[int]:
    computed: list[int] = []
    matmul: Callable[..., torch.Tensor] = kernels.matmul

    def counted(x: torch.Tensor, *weight: Any) -> torch.Tensor:
        computed.append(len(x))
        return matmul(x, *weight)

    monkeypatch.setattr(kernels, "matmul", counted)
    return computed


def test_columns_that_cannot_be_divided_are_refused() -> None:
    made = config()
    made._divided = [("down.weight", "Q4_K", 768), ("down2.weight", "Q8_0", 768)]
    made.check_ranks(1)
    made.check_ranks(3)
    with pytest.raises(BridgeError) as caught:
        made.check_ranks(2)
    assert caught.value.reason == "unsupported_quantization"
    assert caught.value.details == {
        "option": "tensor_parallel_size",
        "value": 2,
        "tensor": "down.weight",
    }
    assert "blocks of 256 (Q4_K)" in caught.value.message
    made._divided = made._divided[1:]
    made.check_ranks(2)


def test_layers_without_packed_tensors_are_vllms_own() -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    with rank(0, 1):
        for type in ("F32", "BF16", "MXFP4"):
            made = config(down=Matrix(type, HIDDEN, INNER))
            layer = ReplicatedLinear(INNER, HIDDEN, False, quant_config=made, prefix="down")
            assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_a_layer_that_the_file_has_a_part_of() -> None:
    with pytest.raises(ValueError, match=r"no tensor `k\.weight`"):
        config(q=Matrix("Q8_0", 32, 32))._weights("q.weight", "k.weight")


def test_a_folder_without_a_file(tmp_path: Path) -> None:
    from vllm_bridge.quantization.gguf import layers

    with pytest.raises(ValueError, match=r"has no GGUF file.*`draft_load_config`"):
        layers.read(str(tmp_path))


def test_experts_on_a_gpu_go_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    def checked(is_moe: bool, enforce_eager: bool) -> None:
        given = SimpleNamespace(
            model_config=SimpleNamespace(is_moe=is_moe, enforce_eager=enforce_eager),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            quant_config=config(),
        )
        GGUF().check_layer(given, None)

    checked(is_moe=True, enforce_eager=False)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    checked(is_moe=True, enforce_eager=True)
    checked(is_moe=False, enforce_eager=False)
    with pytest.raises(BridgeError, match="Give `enforce_eager: true`") as caught:
        checked(is_moe=True, enforce_eager=False)
    assert caught.value.reason == "unsupported_quantization"


def test_a_layer_whose_columns_are_no_whole_blocks() -> None:
    from vllm_bridge.quantization.gguf import layers

    with pytest.raises(
        ValueError, match="384 columns are not whole blocks of Q4_K, which have 256"
    ):
        layers.parts([12], [8], 384)


def test_adapters_do_not_go_with_packed_experts() -> None:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    matrix = Matrix("Q8_0", 32, 32)
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace(is_lora_enabled=True)
    layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name = "gate", "down"
    layer.ckpt_up_proj_name = "up"
    made = config(**{f"experts.{part}": matrix for part in ("gate", "up", "down")})
    with pytest.raises(ValueError, match="adapters do not go with packed experts"):
        made.get_quant_method(layer, "experts")
