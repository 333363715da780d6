"""Layers in GPTQ's formats, made and loaded as vLLM does it, against the weights that were packed
by NumPy."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.inc import INCConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import PlatformEnum

import checkpoints
import loading
import mixtures
from vllm_bridge import patches, quantization
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.patches.cpu.packed_linear import PackedLinearKernel
from vllm_bridge.quantization.gptq.format import Settings
from vllm_bridge.quantization.gptq.layers import GPTQConfig, GPTQLinearMethod
from vllm_bridge.quantization.packed import native

COLUMNS, ROWS = 256, 128
NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    patches.apply()
    with loading.environment():
        yield


class Packed:
    """A random layer: its tensors as a checkpoint has them, and the weights they stand for."""

    def __init__(
        self,
        seed: int = 0,
        rows: int = ROWS,
        columns: int = COLUMNS,
        bits: int = 4,
        group_size: int = 64,
        sym: bool = True,
        desc_act: bool = False,
        checkpoint_format: str = "gptq",
    ) -> None:
        random = np.random.default_rng(seed)
        size = columns if group_size == -1 else group_size
        group = np.arange(columns) // size
        if desc_act:
            random.shuffle(group)
        groups = columns // size
        integers = random.integers(0, 2**bits, (columns, rows))
        zeros = np.full((groups, rows), 2 ** (bits - 1))
        if not sym:
            zeros = random.integers(0, 2**bits, (groups, rows))  # with zero points of 0
        # Powers of two, so that the weights are the same in any dtype.
        scales = 2.0 ** random.integers(-8, -5, (groups, rows))
        self.weight = torch.from_numpy(((integers - zeros[group]) * scales[group]).T)
        stored = _words(zeros, bits)
        if checkpoint_format == "gptq" and 32 % bits == 0:
            # As gptqmodel makes the older format of the newer one.
            stored = stored - np.uint32(sum(1 << bit for bit in range(0, 32, bits)))
        elif checkpoint_format == "gptq":
            stored = _words((zeros - 1) % 2**bits, bits)
        self.tensors = {
            "qweight": _tensor(_words(integers.T, bits).T),
            "qzeros": _tensor(stored),
            "scales": torch.from_numpy(scales).half(),
            "g_idx": torch.from_numpy(group).int(),
        }


def _words(numbers: Any, bits: int) -> Any:
    """The bits of the numbers of each row one after another, in words of 32."""
    fields = (numbers[..., None] >> np.arange(bits)) & 1
    octets = np.packbits(fields.reshape(len(numbers), -1).astype(np.uint8), 1, "little")
    return octets.view("<u4")


def _tensor(words: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def config(**settings: Any) -> Any:
    defaults = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    return GPTQConfig.from_config({"quant_method": "gptq"} | defaults | settings)


@contextlib.contextmanager
def made(
    kind: Any,
    quant_config: Any,
    *sizes: Any,
    ranks: int = 1,
    rank: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Any]:
    """A layer of vLLM's, for one of so many ranks."""
    one = VllmConfig()
    one.model_config = SimpleNamespace(dtype=dtype)
    before = parallel_state._TP
    parallel_state._TP = SimpleNamespace(rank_in_group=rank, world_size=ranks)
    torch.set_default_dtype(dtype)
    try:
        with set_current_vllm_config(one), torch.no_grad():
            yield kind(
                *sizes, bias=False, quant_config=quant_config, prefix=NAME, return_bias=False
            )
    finally:
        torch.set_default_dtype(torch.float32)
        parallel_state._TP = before


def fill(layer: Any, packed: Packed, *part: Any) -> None:
    parameters = dict(layer.named_parameters())
    for name, tensor in packed.tensors.items():
        if name in parameters:
            parameters[name].weight_loader(parameters[name], tensor, *part)


def check(layer: Any, weight: torch.Tensor) -> None:
    layer.quant_method.process_weights_after_loading(layer)
    check_products(layer, weight)


def check_products(layer: Any, weight: torch.Tensor) -> None:
    """The layer's products, at one token and at many, are those of the weight."""
    columns = weight.shape[1]
    for count in (1, 5, 70):
        x = torch.randint(-8, 9, (count, columns)).to(layer.scales.dtype)  # sums of few bits
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(
            layer.quant_method.apply(layer, x).double(), expected, rtol=2**-8, atol=2**-8
        )


EVERY = [
    {"bits": bits, "group_size": group, "sym": sym, "desc_act": desc_act, "checkpoint_format": form}
    for bits, (group, desc_act), (sym, form) in itertools.product(
        (2, 3, 4, 8),
        ((-1, False), (-1, True), (32, True), (64, False), (128, True)),
        ((True, "gptq"), (False, "gptq"), (False, "gptq_v2")),
    )
]


@pytest.mark.parametrize("settings", EVERY, ids=lambda one: "-".join(map(str, one.values())))
def test_every_format(settings: dict[str, Any]) -> None:
    packed = Packed(**settings)
    with made(ReplicatedLinear, config(**settings), COLUMNS, ROWS) as layer:
        fill(layer, packed)
        check(layer, packed.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_float16(bits: int) -> None:
    settings: dict[str, Any] = {"bits": bits, "sym": False, "desc_act": True}
    packed = Packed(**settings)
    sizes = (COLUMNS, ROWS)
    with made(ReplicatedLinear, config(**settings), *sizes, dtype=torch.float16) as layer:
        fill(layer, packed)
        check(layer, packed.weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_compiled_graph_has_it_whole(bits: int) -> None:
    settings: dict[str, Any] = {"bits": bits, "sym": False, "desc_act": True}
    with made(ReplicatedLinear, config(**settings), COLUMNS, ROWS) as layer:
        fill(layer, Packed(**settings))
        method = layer.quant_method
        method.process_weights_after_loading(layer)
        compiled = torch.compile(method.apply, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, COLUMNS)
        assert torch.equal(compiled(layer, x), method.apply(layer, x))


def test_what_vllm_computes_itself_is_left_to_it() -> None:
    with made(ReplicatedLinear, config(), COLUMNS, ROWS) as layer:
        assert type(layer.quant_method) is AutoGPTQLinearMethod


@pytest.mark.parametrize("sym", [True, False])
def test_vllms_own_kernel(sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs for which there is no faster one."""
    kernels = linear._POSSIBLE_KERNELS
    own = [kernel for kernel in kernels[PlatformEnum.CPU] if kernel is not PackedLinearKernel]
    monkeypatch.setitem(kernels, PlatformEnum.CPU, own)
    settings: dict[str, Any] = {"sym": sym, "desc_act": True}
    packed = Packed(**settings)
    with made(ReplicatedLinear, config(**settings), COLUMNS, ROWS) as layer:
        assert type(layer.quant_method.kernel) is CPUWNA16LinearKernel
        fill(layer, packed)
        check(layer, packed.weight)


@pytest.mark.parametrize("sym", [True, False])
def test_what_vllm_has_a_kernel_for_is_given_to_it(sym: bool) -> None:
    with made(ReplicatedLinear, config(sym=sym, desc_act=True), COLUMNS, ROWS) as layer:
        assert type(layer.quant_method.kernel).__name__ == loading.INTEGERS


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("orders", [(1, 1, 1), (1, 2, 3)], ids=["the same order", "others"])
def test_queries_keys_and_values_in_one_layer(bits: int, orders: tuple[int, ...]) -> None:
    settings: dict[str, Any] = {"bits": bits, "sym": False, "desc_act": True}
    rows = (128, 64, 64)
    parts = [Packed(seed, count, **settings) for seed, count in zip(orders, rows, strict=True)]
    with made(QKVParallelLinear, config(**settings), COLUMNS, 32, 4, 2) as layer:
        for name, part in zip("qkv", parts, strict=True):
            fill(layer, part, name)
        check(layer, torch.cat([part.weight for part in parts]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [True, False])
def test_outputs_are_divided_among_ranks(bits: int, desc_act: bool) -> None:
    settings: dict[str, Any] = {"bits": bits, "sym": False, "desc_act": desc_act}
    packed = Packed(**settings)
    for rank, weight in enumerate(packed.weight.chunk(2)):
        sizes = (COLUMNS, ROWS)
        with made(ColumnParallelLinear, config(**settings), *sizes, ranks=2, rank=rank) as layer:
            fill(layer, packed)
            check(layer, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_inputs_are_divided_among_ranks(bits: int, group_size: int) -> None:
    settings: dict[str, Any] = {"bits": bits, "sym": False, "group_size": group_size}
    packed = Packed(**settings)
    for rank, weight in enumerate(packed.weight.chunk(2, dim=1)):
        sizes = (COLUMNS, ROWS)
        with made(RowParallelLinear, config(**settings), *sizes, ranks=2, rank=rank) as layer:
            fill(layer, packed)
            check(layer, weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"desc_act": True}, "desc_act"), ({"group_size": COLUMNS}, "among 2 ranks")],
)
def test_inputs_that_cannot_be_divided(settings: dict[str, Any], words: str) -> None:
    with (
        pytest.raises(ValueError, match=words),
        made(RowParallelLinear, config(**settings), COLUMNS, ROWS, ranks=2),
    ):
        pass


def test_settings_of_single_modules() -> None:
    dynamic = {
        "-:.*o_proj": {},
        r".*\.1\..*": {"bits": 8, "group_size": 32},
        "+:.*up_proj": {"sym": False, "desc_act": True},
    }
    one = config(dynamic=dynamic)
    one.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    one.modules_in_block_to_quantize = ["layers.0", "layers.1"]
    layer = "model.layers.0.mlp"
    assert one.settings_of(f"{layer}.down_proj") == Settings(4, 64, False, True)
    assert one.settings_of(f"{layer}.up_proj") == Settings(4, 64, True, False)
    assert one.settings_of("model.layers.1.mlp.down_proj") == Settings(8, 32, False, True)
    assert one.settings_of("model.layers.0.self_attn.o_proj") is None
    assert one.settings_of("model.layers.2.mlp.down_proj") is None
    with pytest.raises(ValueError, match="gate_up_proj`, are quantized in different ways"):
        one.settings_of(f"{layer}.gate_up_proj")


def test_a_layer_with_settings_of_its_own() -> None:
    packed = Packed(bits=2, group_size=32, desc_act=True)
    dynamic = {".*down_proj": {"bits": 2, "group_size": 32, "desc_act": True}}
    with made(ReplicatedLinear, config(dynamic=dynamic), COLUMNS, ROWS) as layer:
        fill(layer, packed)
        check(layer, packed.weight)


def test_a_layer_in_the_usual_order_beside_others_that_are_not() -> None:
    packed = Packed()
    dynamic = {".*up_proj": {"desc_act": True}}
    with made(ReplicatedLinear, config(dynamic=dynamic), COLUMNS, ROWS) as layer:
        fill(layer, packed)  # its order too, which is read for the sake of the others
        check(layer, packed.weight)


def test_a_layer_that_is_not_quantized() -> None:
    with made(ReplicatedLinear, config(dynamic={"-:.*": {}}), COLUMNS, ROWS) as layer:
        assert type(layer.quant_method) is UnquantizedLinearMethod


def test_a_head_whose_vocabulary_is_filled_up() -> None:
    packed = Packed(rows=96, bits=4, sym=False, desc_act=True)
    with made(_head, config(sym=False, desc_act=True, lm_head=True), 96, COLUMNS) as head:
        assert isinstance(head.quant_method, GPTQLinearMethod)
        fill(head, packed)
        check(head, torch.cat([packed.weight, torch.zeros(32, COLUMNS)]))


def _head(vocabulary: int, columns: int, quant_config: Any, **_options: Any) -> Any:
    return ParallelLMHead(
        vocabulary, columns, quant_config=quant_config, prefix="lm_head", padding_size=128
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 5}, "not 5"),
        ({"checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"dynamic": {".*": {"bits": 6}}}, "not 6"),
    ],
)
def test_formats_that_are_not_known(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**settings)


# -- models


def test_what_computes_it_is_told(tmp_path: Path) -> None:
    for name, kernel in (
        ("demo-gptq", loading.INTEGERS),
        ("gptq-w4-asym-act", loading.INTEGERS),
        ("gptq-w3", native.kernel()),
    ):
        folder = checkpoints.make(name, tmp_path / name)
        assert loading.configure(folder, quantization="gptq")[1] == kernel


@pytest.mark.parametrize("name", ["gptq-w3", "gptq-w8"])
def test_ranks(name: str, tmp_path: Path) -> None:
    folder = checkpoints.make(name, tmp_path / name)
    made, kernel = loading.configure(folder, tensor_parallel_size=2)
    assert made.parallel_config.tensor_parallel_size == 2
    assert kernel is not None


def test_ranks_for_inputs_in_the_order_of_their_activations(tmp_path: Path) -> None:
    folder = checkpoints.make("gptq-w4-act", tmp_path / "model")
    with pytest.raises(BridgeError, match="desc_act") as caught:
        loading.configure(folder, tensor_parallel_size=2)
    assert caught.value.reason == "unsupported_quantization"
    assert "`tensor_parallel_size: 2`" in caught.value.message


def test_ranks_that_would_divide_a_group(tmp_path: Path) -> None:
    folder = checkpoints.make("gptq-w3", tmp_path / "model")
    with pytest.raises(BridgeError, match="256 inputs in groups of 128 cannot be divided among 4"):
        loading.configure(folder, tensor_parallel_size=4)


def change_config(folder: Path, **settings: Any) -> None:
    config = checkpoints.read_config(folder)
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


def change_tensor(folder: Path, part: str, change: Callable[[Any], Any]) -> str:
    """Changes the last of the tensors of that name; returns its own."""
    file = folder / checkpoints.WEIGHTS
    tensors = load_file(file)
    name = max(name for name in tensors if name.endswith(f"down_proj.{part}"))
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("g_idx", lambda order: order + 1),
        ("g_idx", lambda order: order - 1),
        ("g_idx", lambda order: order.clamp(max=2)),
        ("g_idx", lambda order: order[:-1].clone()),
        ("g_idx", lambda order: order.long()),
        ("qweight", lambda words: words[:-1].clone()),
        ("qweight", lambda words: words.float()),
        ("qzeros", lambda words: words[:, :-1].clone()),
        ("scales", lambda scales: scales[:-1].clone()),
        ("scales", lambda scales: scales.int()),
    ],
    ids=[
        *("a group too many", "a group of -1", "groups of other sizes", "an input too few"),
        *("an order in 64 bits", "words too few", "words that are none", "zero points too few"),
        *("scales too few", "scales that are none"),
    ],
)
def test_tensors_that_lie(part: str, change: Callable[[Any], Any], tmp_path: Path) -> None:
    folder = checkpoints.make("gptq-w4-asym-act", tmp_path / "model")
    name = change_tensor(folder, part, change)
    error = invalid(folder)
    assert name.rpartition(".")[0] in error.message


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2},
        {"bits": 3},
        {"bits": 8},
        {"group_size": 128},
        {"group_size": -1},
        {"desc_act": False},
        {"dynamic": {".*down_proj": {"bits": 8}}},
        {"dynamic": {"+:.*q_proj": {"group_size": 32}}},
        {"dynamic": {"(": {}}},
        {"dynamic": [1]},
    ],
    ids=str,
)
def test_settings_that_lie(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoints.make("gptq-w4-asym-act", tmp_path / "model")
    change_config(folder, **settings)
    invalid(folder)


@pytest.mark.parametrize("part", ["g_idx", "qzeros", "scales"])
def test_tensors_that_are_missing(part: str, tmp_path: Path) -> None:
    folder = checkpoints.make("gptq-w4-asym-act", tmp_path / "model")
    tensors = load_file(folder / checkpoints.WEIGHTS)
    del tensors[f"model.layers.3.mlp.up_proj.{part}"]
    save_file(tensors, folder / checkpoints.WEIGHTS, {"format": "pt"})
    assert "model.layers.3.mlp.up_proj" in invalid(folder).message


def invalid(folder: Path) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        quantization.check(check_model(str(folder), {}))
    assert caught.value.reason == "invalid_checkpoint"
    return caught.value


def test_checkpoints_that_are_right(tmp_path: Path) -> None:
    for name in (one.name for one in checkpoints.CHECKPOINTS.glob("gptq-*")):
        folder = checkpoints.make(name, tmp_path / name)
        quantization.check(check_model(str(folder), {}))


def test_a_head_and_single_modules_with_settings_of_their_own(tmp_path: Path) -> None:
    folder = checkpoints.make("gptq-w4-act", tmp_path / "model")
    of_head: dict[str, Any] = {"bits": 8, "group_size": 32, "sym": False, "desc_act": False}
    of_layer: dict[str, Any] = {"bits": 3, "group_size": 64, "sym": False}
    plain = "model.layers.4.self_attn.o_proj"
    dynamic = {
        "+:lm_head": of_head,
        r"+:.*\.2\.mlp\.down_proj": of_layer,
        f"-:{plain}": {},
    }
    change_config(folder, lm_head=True, dynamic=dynamic)
    tensors = load_file(folder / checkpoints.WEIGHTS)
    head = Packed(rows=len(tensors.pop("lm_head.weight")), **of_head)
    down = Packed(rows=256, columns=512, desc_act=True, **of_layer)
    for name, packed in (("lm_head", head), ("model.layers.2.mlp.down_proj", down)):
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
    for part in head.tensors:
        del tensors[f"{plain}.{part}"]
    tensors[f"{plain}.weight"] = torch.ones(256, 256).bfloat16()
    save_file(tensors, folder / checkpoints.WEIGHTS, {"format": "pt"})
    with loading.worker(tmp_path):
        model = loading.load(folder)
    layers = model.model.layers
    assert type(layers[4].self_attn.o_proj.quant_method) is UnquantizedLinearMethod
    for layer, weight in ((model.lm_head, head.weight), (layers[2].mlp.down_proj, down.weight)):
        check_products(layer, weight)


@pytest.mark.slow
def test_experts_are_dequantized_while_they_are_read(tmp_path: Path) -> None:
    made = mixtures.make("gptq-act", tmp_path / "models")
    with loading.worker(tmp_path):
        quantized, plain = (loading.load(folder) for folder in (made.quantized, made.plain))
    expected = dict(plain.named_parameters())
    found = {
        name: parameter for name, parameter in quantized.named_parameters() if ".experts." in name
    }
    assert found
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
    with loading.environment():
        error = loading.refused(made.quantized, enable_lora=True)
    assert error.reason == "unsupported_quantization"
    assert "Leave out `enable_lora`" in error.message


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_auto_rounds_layers(bits: int, sym: bool) -> None:
    settings = {"bits": bits, "sym": sym, "packing_format": "auto_round:auto_gptq"}
    packed = Packed(bits=bits, sym=sym)
    one = INCConfig.from_config({"group_size": 64} | settings)
    with made(ReplicatedLinear, one, COLUMNS, ROWS) as layer:
        fill(layer, packed)
        check(layer, packed.weight)
