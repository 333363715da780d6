"""SqueezeLLM without an engine: its packing, what is sparse, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import checkpoints
import squeezellm_models
from checkpoints import DEMO, WEIGHTS
from vllm_bridge import quantization
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization.packed import grouped, native, sparse, tables
from vllm_bridge.quantization.packed.shards import Shards

LAYER = "model.layers.1.mlp.down_proj"
ROWS, COLUMNS = 24, 64

State = dict[str, Any]


def matrix(bits: int, is_sparse: bool) -> tuple[State, torch.Tensor]:
    """The tensors of a small matrix, and its weights."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    sensitivity = torch.rand(ROWS, COLUMNS, generator=generator)
    layer = squeezellm_models.quantize(weight, sensitivity, bits, is_sparse)
    tensors: State = {
        "qweight": squeezellm_models.pack(layer.integers, bits),
        "lookup_table": layer.table,
    }
    if layer.sparse is not None:
        full = torch.tensor([3, 20])
        rest = layer.sparse.index_fill(0, full, 0.0).to_sparse_csr()
        tensors |= {
            "rows": rest.crow_indices().int(),
            "cols": rest.col_indices().int(),
            "vals": rest.values(),
            "full_rows": layer.sparse[full].T.contiguous(),
            "full_row_indices": full.int(),
        }
    return tensors, layer.weight()


class Layer(torch.nn.Module):  # type: ignore[misc]
    """A layer as vLLM makes it."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = rank, ranks


def made(
    bits: int, columns: int, rows: list[int], tensors: list[State], rank: int, ranks: int
) -> tuple[Any, Any]:
    """A layer of vLLM's with these matrices, and its method."""
    from vllm_bridge.quantization.squeezellm.layers import SqueezeLLMLinear

    layer: Any = Layer(rank, ranks)
    method = SqueezeLLMLinear(bits)
    method.create_weights(layer, columns, rows, COLUMNS, sum(rows), torch.float32)
    for number, parts in enumerate(tensors):
        for name, tensor in parts.items():
            getattr(layer, name).weight_loader(None, tensor, number)
    method.process_weights_after_loading(layer)
    return layer, method


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_together_compute_what_the_matrices_say(
    bits: int, is_sparse: bool, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shards, "_ranks", lambda self, number: ranks)
    matrices = [matrix(bits, is_sparse), matrix(bits, False)]
    x = torch.randn(2, 5, COLUMNS)
    sizes = [ROWS // ranks] * 2
    outputs = []
    for rank in range(ranks):
        layer, method = made(
            bits, COLUMNS, sizes, [tensors for tensors, _ in matrices], rank, ranks
        )
        outputs.append(method.apply(layer, x).split(sizes, -1))
    found = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    torch.testing.assert_close(found, [x @ weight.T for _, weight in matrices])


@pytest.mark.parametrize("bits", [3, 4])
def test_ranks_that_have_columns_add_up(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shards, "_ranks", lambda self, number: 1)
    tensors, weight = matrix(bits, True)
    x = torch.randn(5, COLUMNS)
    total = torch.zeros(5, ROWS)
    half = COLUMNS // 2
    for rank in range(2):
        layer, method = made(bits, half, [ROWS], [tensors], rank, 2)
        total += method.apply(layer, x[:, half * rank : half * (rank + 1)])
    torch.testing.assert_close(total, x @ weight.T)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("tokens", [1, 7, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_product_is_rounded_once(
    bits: int, tokens: int, dtype: torch.dtype, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sparse is a part of the weights, and not a number added to a rounded product."""
    if not is_compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    generator = torch.Generator().manual_seed(7)
    integers = torch.randint(0, 2**bits, (48, 64), generator=generator)
    table = torch.randn(48, 2**bits, generator=generator).to(dtype)
    rows, columns = torch.tensor([2, 0, 2, 47, 2]), torch.tensor([1, 3, 0, 63, 1])
    # So large that a product of the rest would lose all its digits before they are added.
    values = torch.tensor([1.0, 2048.0, -2048.0, 1024.0, 3.0])
    added = sparse.compress(rows, columns, values, (48, 64))
    assert added.starts[:4].tolist() == [0, 1, 1, 3]
    weight = table.float().gather(1, integers)
    weight.index_put_((rows, columns), values, accumulate=True)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    product = tables.matmul(x, grouped.pack(integers, bits), table, bits, added)
    # The weights themselves are rounded where a strip of them is made.
    made = weight.to(
        dtype if tokens > native.few_tokens(dtype) or not is_compiled else torch.float32
    )
    expected = x.double() @ made.double().T
    # What is left of the sums' own rounding, in float32.
    torch.testing.assert_close(product.double(), expected.to(dtype).double(), rtol=0.004, atol=1e-3)


def test_what_is_sparse_makes_weights_of_the_dtype() -> None:
    plain = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).bfloat16()
    added = sparse.compress(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.ones(2) / 3, (2, 2))
    found = sparse.rounded(added, plain)
    sums = plain.float()[[0, 1], [1, 0]] + found.values
    assert torch.equal(sums, sums.bfloat16().float())
    torch.testing.assert_close(found.values, added.values, atol=2**-8, rtol=0)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_compiled_graph_has_it_whole(is_sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shards, "_ranks", lambda self, number: 1)
    layer, method = made(4, COLUMNS, [ROWS], [matrix(4, is_sparse)[0]], 0, 1)
    compiled = torch.compile(method.apply, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, COLUMNS)
    assert torch.equal(compiled(layer, x), method.apply(layer, x))


def test_a_sparse_part_without_its_values() -> None:
    tensors, _ = matrix(4, True)
    del tensors["vals"]
    with pytest.raises(ValueError, match="not initialized from checkpoint: vals"):
        made(4, COLUMNS, [ROWS], [tensors], 0, 1)


def test_values_that_are_no_numbers() -> None:
    tensors, _ = matrix(4, True)
    tensors["vals"][0] = torch.nan
    with pytest.raises(ValueError, match="not finite numbers"):
        made(4, COLUMNS, [ROWS], [tensors], 0, 1)


# -- what a folder says


def stored(folder: Path, change: Callable[[State], None] = lambda _: None, bits: Any = 3) -> Path:
    """A folder with one matrix in SqueezeLLM's own format."""
    folder.mkdir()
    (folder / "config.json").write_text((DEMO / "config.json").read_text())
    (folder / "quant_config.json").write_text(json.dumps({"wbits": bits}))
    state = {f"{LAYER}.{part}": tensor for part, tensor in matrix(3, True)[0].items()}
    state[f"sparse_threshold.{LAYER}"] = 9
    change(state)
    torch.save(state, folder / squeezellm_models.FILE)
    return folder


def test_a_model_is_known_by_its_quant_config(tmp_path: Path) -> None:
    checkpoint = check_model(str(stored(tmp_path / "model")), {})
    assert checkpoint.quantization == {"quant_method": "squeezellm", "wbits": 3}
    assert checkpoint.description == "squeezellm (3 bits)"
    assert checkpoint.load_format == "squeezellm"
    assert checkpoint.tensors[f"{LAYER}.qweight"].shape == (COLUMNS // 32 * 3, ROWS)
    assert f"sparse_threshold.{LAYER}" not in checkpoint.tensors
    quantization.check(checkpoint)


def test_a_quant_config_beside_safetensors(tmp_path: Path) -> None:
    folder = stored(tmp_path / "model")
    state = torch.load(folder / squeezellm_models.FILE)
    (folder / squeezellm_models.FILE).unlink()
    save_file(
        {name: one for name, one in state.items() if name.startswith(LAYER)}, folder / WEIGHTS
    )
    checkpoint = check_model(str(folder), {})
    assert checkpoint.quantization == {"quant_method": "squeezellm", "wbits": 3}
    assert checkpoint.load_format == "hf"
    quantization.check(checkpoint)


def test_a_quant_config_of_another_tool_is_left_to_it(tmp_path: Path) -> None:
    folder = stored(tmp_path / "model")
    for text in ('{"w_bit": 4}', "[]", "no json"):
        (folder / "quant_config.json").write_text(text)
        assert check_model(str(folder), {}).quantization is None


def test_two_files_of_weights(tmp_path: Path) -> None:
    folder = stored(tmp_path / "model")
    (folder / "another.pt").write_bytes(b"")
    with pytest.raises(BridgeError) as caught:
        check_model(str(folder), {})
    assert caught.value.details["files"] == ["another.pt", squeezellm_models.FILE]


def put(name: str, value: Any) -> Callable[[State], None]:
    def change(state: State) -> None:
        if value is None:
            del state[f"{LAYER}.{name}"]
        else:
            state[f"{LAYER}.{name}"] = value

    return change


def set_last(name: str, number: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[f"{LAYER}.{name}"][-1] = number

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("lookup_table", None), "`lookup_table` is missing"),
        (put("qweight", None), "`qweight` is missing"),
        (put("lookup_table", torch.zeros(ROWS, 16)), "8 values for each of 24 rows"),
        (put("qweight", torch.zeros(7, ROWS, dtype=torch.int32)), "no integers of 3 bits"),
        (put("vals", None), "`vals` is missing"),
        (put("rows", torch.zeros(ROWS, dtype=torch.int32)), "not the starts of 24 rows"),
        (set_last("rows", 2), "`rows`"),
        (set_last("cols", COLUMNS), f"to {COLUMNS}, of {COLUMNS}"),
        (put("full_rows", torch.zeros(3, 2)), "`full_rows` has the shape [3, 2]"),
        (set_last("full_row_indices", -1), "`full_row_indices` has numbers from -1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_they_are_read(
    change: Callable[[State], None], words: str, tmp_path: Path
) -> None:
    with pytest.raises(BridgeError) as caught:
        quantization.check(check_model(str(stored(tmp_path / "model", change)), {}))
    assert caught.value.reason == "invalid_checkpoint"
    assert LAYER in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize("bits", [2, 16, "3", None])
def test_bits_that_squeezellm_does_not_have(bits: Any, tmp_path: Path) -> None:
    with pytest.raises(BridgeError) as caught:
        quantization.check(check_model(str(stored(tmp_path / "model", bits=bits)), {}))
    assert "not 3 or 4" in caught.value.message


def test_quantized_experts_are_refused(tmp_path: Path) -> None:
    def change(state: State) -> None:
        for name in [name for name in state if name.startswith(LAYER)]:
            state[name.replace("mlp.", "mlp.experts.0.")] = state.pop(name)

    with pytest.raises(BridgeError) as caught:
        quantization.check(check_model(str(stored(tmp_path / "model", change)), {}))
    assert caught.value.reason == "unsupported_quantization"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezellm", "squeezellm-sparse"])
def test_the_demo_model_is_what_was_quantized(name: str, tmp_path: Path) -> None:
    model = checkpoints.make(name, tmp_path / name)
    quantization.check(check_model(str(model), {}))
    is_sparse = not (model / WEIGHTS).exists()
    unpacked = squeezellm_models.unpack(model)
    for layer, one in squeezellm_models.layers(3 if is_sparse else 4, is_sparse).items():
        table = one.table if is_sparse else one.table.half()
        expected = one._replace(table=table.bfloat16().float()).weight()
        assert torch.equal(unpacked[f"{layer}.weight"], expected)
