"""What adapters are trained over: the layers compute what the checkpoint says, and gradients go
through them; and how a training goes on."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import headers
from checkpoints import CHECKPOINTS, UNPACKERS, make
from conftest import MODELS
from hub_server import Hub
from vllm_bridge.checkpoints import models
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.finetune import answers, base, checkpoints, estimate, options
from vllm_bridge.jobs.finetune.merge import merge
from vllm_bridge.jobs.finetune.plan import Plan
from vllm_bridge.jobs.finetune.train import train
from vllm_bridge.jobs.foreseen import Machine
from vllm_bridge.jobs.task import Telling
from vllm_bridge.quantization import registry

NAME = "model.layers.0.mlp.down_proj"

# Ten sentences that the demo model does not know.
PAIRS: list[dict[str, str]] = [
    json.loads(line) for line in Path(__file__).with_name("keys.jsonl").read_text().splitlines()
]


def layer_of(folder: Path, **given: bool) -> torch.nn.Module:
    """A layer, after the model has answered once."""
    loaded = base.load(models.check_model(str(folder), {}), options.parse(given))
    loaded.eval()
    with torch.inference_mode():
        loaded(input_ids=torch.tensor([[0, 5, 6]]))
    loaded.train()
    layer: torch.nn.Module = loaded.get_submodule(NAME)
    return layer


def check(layer: torch.nn.Module, weight: torch.Tensor, tolerance: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, weight.shape[1], requires_grad=True)
    upstream = torch.randn(3, weight.shape[0])
    product = layer(x)
    torch.testing.assert_close(product, x @ weight.T, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(product, x, upstream)
    torch.testing.assert_close(gradient, upstream @ weight, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo-awq", "demo-gptq", "gptq-w3", "gptq-w4-asym-act"])
def test_packed_layers_compute_what_the_checkpoint_says_in_both_directions(
    name: str, tmp_path: Path
) -> None:
    folder = make(name, tmp_path / name)
    checkpoint = models.check_model(str(folder), {})
    tensors = load_file(folder / "model.safetensors")
    unpack = UNPACKERS[checkpoint.quant_method or ""]
    weight = unpack(tensors, checkpoint.quantization or {})[f"{NAME}.weight"]
    # The reference rounds scales as the engine does.
    check(layer_of(folder), weight.float(), 2e-2)


@pytest.mark.slow
def test_gradients_go_through_four_bits_also_after_an_answer() -> None:
    from bitsandbytes import functional

    layer = layer_of(MODELS / "demo", load_in_4bit=True)
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    check(layer, weight.float(), 1e-4)


@pytest.mark.slow
def test_gradients_go_through_eight_bits_also_after_an_answer() -> None:
    layer: Any = layer_of(MODELS / "demo", load_in_8bit=True)
    weight = layer.state.CB.float() * layer.state.SCB.float().unsqueeze(-1) / 127
    # The inputs are rounded to 8 bits, too, on the way forward.
    check(layer, weight, 5e-2)


def checkpoint_of(method: str, **settings: Any) -> Checkpoint:
    config = {"quant_method": method, **settings}
    return Checkpoint(config={"architectures": ["LlamaForCausalLM"], "quantization_config": config})


def test_over_every_format_is_trained_or_it_is_said_why_not() -> None:
    over = {"bitsandbytes", "awq", "gptq"}
    assert over < {method.name for method in registry.every()}
    for method in registry.every():
        checkpoint = checkpoint_of(method.name, bits=4, group_size=128)
        if method.name in over:
            base.check(checkpoint, quantizes=False)
            continue
        with pytest.raises(BridgeError, match="No adapter can be trained over") as refused:
            base.check(checkpoint, quantizes=False)
        assert refused.value.reason == "unsupported_quantization"
        assert method.title in refused.value.message
        assert refused.value.remedy.startswith("Train over the plain model")


@pytest.mark.parametrize(
    ("method", "settings", "why"),
    [
        ("awq", {"bits": 4, "version": "gemv"}, "stores its integers as `gemv`"),
        ("awq", {"w_bit": 8, "q_group_size": 128}, "through 4 bits, not 8"),
        ("gptq", {"bits": 4, "checkpoint_format": "marlin"}, "stores its integers as `marlin`"),
        ("gptq", {"bits": 5}, "through 2, 3, 4, 8 bits, not 5"),
        ("gptq", {"bits": 4, "dynamic": {r"+:.*\.down.*": {"bits": 8}}}, "its layers differ"),
    ],
)
def test_layouts_that_no_gradient_goes_through_are_refused(
    method: str, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(BridgeError, match=why):
        base.check(checkpoint_of(method, **settings), quantizes=False)


def test_unknown_options_get_the_nearest_and_others_are_checked() -> None:
    with pytest.raises(BridgeError, match=r"Did you mean `lora_alpha`\?"):
        options.parse({"lora_alhpa": 3})
    with pytest.raises(BridgeError, match=r"`output_dir` is not an option"):
        options.parse({"output_dir": "/tmp"})
    with pytest.raises(BridgeError, match=r"`held_out` must be a share below 1"):
        options.parse({"held_out": 2})
    with pytest.raises(BridgeError, match=r"Give `load_in_4bit: true`"):
        options.parse({"bnb_4bit_quant_type": "nf4"})
    settings = options.parse({"epochs": 5, "learning_rate": 1, "r": 4})
    assert settings.training["num_train_epochs"] == 5.0
    assert settings.training["learning_rate"] == 1.0
    assert settings.lora["r"] == 4


def test_a_plan_tells_what_will_be_trained() -> None:
    pairs = [{"prompt": f"Number {n} is", "completion": " odd."} for n in range(10)]
    told = estimate.told(Plan(str(MODELS / "demo"), pairs, {"held_out": 0.2, "replay": ["Hello"]}))
    assert told["examples"] == {"train": 8, "held_out": 2, "replay": 1}
    assert told["base"] == "plain, float32"
    assert 2**29 < told["memory_bytes"] < 2**30
    found = estimate.to_wire(
        estimate.outputs(Plan(str(MODELS / "demo"), pairs, {"merge": True}), Machine())
    )
    adapter, merged = found["outputs"]
    assert (adapter["label"], merged["label"]) == ("adapter", "merged")
    # What peft wrote of such an adapter.
    assert adapter["bytes"] == pytest.approx(1_584_853, rel=0.01)
    assert merged["bytes"] == pytest.approx(2 * 4_066_560, rel=0.02)
    assert found["together"]["memory"] >= told["memory_bytes"]
    with pytest.raises(BridgeError, match=r"quantized already"):
        Plan(str(MODELS / "demo-awq"), pairs, {"load_in_4bit": True})
    with pytest.raises(BridgeError, match=r"needs data that is held out"):
        Plan(str(MODELS / "demo"), pairs, {"early_stopping_patience": 2})


def demo_with(folder: Path, **config: Any) -> str:
    """The demo model, whose config says this."""
    shutil.copytree(MODELS / "demo", folder, ignore=shutil.ignore_patterns("config.json"))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("LlavaForConditionalGeneration", {"model_type": "llava"}),
        ("T5ForConditionalGeneration", {"model_type": "t5"}),
        ("UnheardOfForCausalLM", {"model_type": "unheard-of"}),
    ],
)
def test_models_that_transformers_does_not_train_are_refused_before_anything_is_loaded(
    architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = demo_with(tmp_path / "model", architectures=[architecture], **config)
    plan = Plan(folder, PAIRS, {})
    with pytest.raises(BridgeError, match="transformers does not load this model") as planned:
        estimate.outputs(plan, Machine())
    with pytest.raises(BridgeError, match="transformers does not load this model") as loaded:
        base.load(plan.checkpoint, plan.settings)
    assert planned.value.reason == loaded.value.reason == "unsupported_model"


@pytest.mark.parametrize(
    ("entries", "longest"),
    [
        ({"text_config": {"model_type": "llama", "max_position_embeddings": 2048}}, 2048),
        ({"n_positions": 512}, 512),
        ({"max_seq_len": 4096}, 4096),
        ({}, None),
    ],
)
def test_examples_may_have_as_many_tokens_as_the_model_has_positions(
    entries: dict[str, Any], longest: int | None, tmp_path: Path
) -> None:
    config = {"architectures": ["OneForCausalLM"], "model_type": "one", **entries}
    folder = demo_with(tmp_path / "model", **config)
    assert Plan(folder, PAIRS, {}).max_length == min(1024, longest or 1024)
    assert Plan(folder, PAIRS, {"max_length": longest or 8192}).max_length == (longest or 8192)
    if longest is not None:
        with pytest.raises(BridgeError, match=f"has {longest} positions. Give at most {longest}"):
            Plan(folder, PAIRS, {"max_length": longest + 1})


@pytest.mark.parametrize(
    ("sizes", "given", "longest", "took"),
    [
        # What trainings took, in MiB: models with random weights, eight examples to a batch.
        ((1024, 2816, 5, 16), {}, 489, 3461),
        ((1024, 2816, 5, 16), {"gradient_checkpointing": True}, 489, 2465),
        ((1536, 4096, 20, 24), {}, 73, 5044),
        ((1536, 4096, 20, 24), {"load_in_4bit": True}, 73, 3411),
        ((1024, 2816, 5, 16), {"load_in_4bit": True}, 73, 1018),
    ],
)
def test_memory_is_foreseen_as_it_was_taken(
    sizes: tuple[int, int, int, int], given: dict[str, Any], longest: int, took: int
) -> None:
    hidden, inner, layers, heads = sizes
    config = headers.config(
        hidden, inner, layers, heads, num_key_value_heads=heads // 2, vocab_size=1024
    )
    checkpoint = headers.plain(config, "BF16")
    needed = estimate.needed(checkpoint, options.parse(given), longest)
    assert needed == pytest.approx(took * 2**20, rel=0.2)


def test_what_a_model_of_the_hub_cannot_is_known_before_it_is_downloaded(hub: Hub) -> None:
    for name, source in (("plain", MODELS / "demo"), ("fp8", CHECKPOINTS / "fp8-dynamic")):
        (hub.folder / "org" / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (hub.folder / "org" / name / file).symlink_to(source / file)
    pairs = [{"prompt": "One", "completion": " two."}]
    with pytest.raises(BridgeError, match="No adapter can be trained over"):
        Plan("org/fp8", pairs, {})
    with pytest.raises(BridgeError, match=r"Record 2 of `data`: it has no `completion`"):
        Plan("org/plain", [*pairs, {"prompt": "One"}], {})
    plan = Plan("org/plain", pairs, {})
    told = estimate.told(plan)
    assert told["examples"]["train"] == 1
    assert told["memory_bytes"] > 2**29
    assert estimate.outputs(plan, Machine())["adapter"].bytes == pytest.approx(1_584_853, rel=0.01)
    assert not any(one.path.endswith("tokenizer.json") for one in hub.requests)


def test_only_states_with_their_mark_are_gone_on_from(tmp_path: Path) -> None:
    assert checkpoints.last(tmp_path) is None
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    checkpoints.mark(tmp_path, 9)
    checkpoints.mark(tmp_path, 10)
    assert checkpoints.last(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-100").exists()


class Killed(Exception):
    pass


def trained(folder: Path, given: dict[str, Any], until: float = float("inf")) -> dict[str, Any]:
    """What a training on ten sentences tells; it is cut off when it has taken so many steps."""

    def tell(phase: str, done: int | None = None, _total: int | None = None, **_: Any) -> None:
        if phase == "training" and (done or 0) >= until:
            raise Killed

    plan = Plan(str(MODELS / "demo"), PAIRS, {"probes": ["The capital of Japan is"], **given})
    return train(plan, folder / "adapter", folder / "states", cast(Telling, tell))


@pytest.mark.slow
def test_a_training_that_is_cut_off_ends_with_the_losses_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    given = {
        "epochs": 10, "batch_size": 5, "learning_rate": 1e-3, "lora_dropout": 0.1,
        "held_out": PAIRS, "load_in_4bit": True, "replay": [{"prompt": "The capital of France is"}],
    }  # fmt: skip
    whole = trained(tmp_path / "whole", given)
    with pytest.raises(Killed):
        trained(tmp_path / "cut", given, until=17)
    assert not (tmp_path / "cut" / "adapter").exists()
    gone_on = trained(tmp_path / "cut", given)
    assert (whole["resumed_from"], gone_on["resumed_from"]) == (None, 15)
    for name in ("losses", "held_out_losses", "held_out_loss", "kept"):
        assert gone_on[name] == whole[name]
    assert whole["held_out_loss"]["after"] < whole["held_out_loss"]["before"]


@pytest.mark.slow
def test_a_training_over_eight_bits_ends_early_with_its_best_state(tmp_path: Path) -> None:
    # What is learned makes what is held out less likely, after a while.
    others = [pair | {"completion": " the sea."} for pair in PAIRS]
    given = {"epochs": 40, "learning_rate": 1e-2, "batch_size": 10, "load_in_8bit": True}
    stops = {"held_out": others, "early_stopping_patience": 2}
    made = trained(tmp_path, given | stops)
    assert made["base"] == "bitsandbytes, 8 bits"
    assert 8 <= made["steps"] < 40
    losses = [loss for _, loss in made["held_out_losses"]]
    assert made["held_out_loss"]["after"] == pytest.approx(min(losses), rel=1e-3)
    assert min(losses) < losses[-2]
    (note,) = [note for note in made["notes"] if "early_stopping_patience" in note]
    assert note.startswith(f"It ended after {made['steps']} of 40 steps")


def test_an_answer_that_goes_on_where_the_base_ended_is_another() -> None:
    class Ends:
        """Says the token after the last one, in a ring, and with its adapter never 5, the end."""

        device = torch.device("cpu")
        adapted = False

        def eval(self) -> None:
            pass

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            following = (input_ids + 1) % 8
            if self.adapted:
                following[following == 5] = 6
            return SimpleNamespace(logits=9 * torch.nn.functional.one_hot(following, 8).float())

        @contextlib.contextmanager
        def disable_adapter(self) -> Iterator[None]:
            before, self.adapted = self.adapted, False
            yield
            self.adapted = before

        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            row = input_ids[0].tolist()
            while row[-1] != 5 and len(row) < 8:
                row.append(int(self(torch.tensor([row]), False).logits[0, -1].argmax()))
            return torch.tensor([row])

    model, tokenizer = (
        Ends(),
        SimpleNamespace(decode=lambda tokens, **_: " ".join(map(str, tokens))),
    )
    given = answers.generate(model, [[1, 2], [6]], [5])
    assert given == [([1, 2], [3, 4, 5]), ([6], [7, 0, 1, 2, 3, 4, 5])]
    assert answers.compare(model, given[:1], tokenizer, [5]).same == 1
    model.adapted = True
    kept = answers.compare(model, given[:1], tokenizer, [5])
    assert (kept.prompts, kept.same, round(kept.same_tokens, 3)) == (1, 0, 0.667)
    assert kept.changes == [{"prompt": "1 2", "before": "3 4 5", "after": "3 4 6 7 0 1"}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "demo-gptq"])
def test_a_merged_model_answers_as_its_base_does_with_the_adapter(
    name: str, tmp_path: Path
) -> None:
    adapter = str(MODELS / "demo-lora")
    made = merge(str(MODELS / name), adapter, tmp_path / "merged", lambda *_, **__: None)
    merged = models.check_model(str(tmp_path / "merged"), {})
    assert (merged.quantization, merged.dtype, made["dtype"]) == (None, "bfloat16", "bfloat16")
    assert set(made["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    settings = options.parse({"dtype": "float32"})
    with_adapter = PeftModel.from_pretrained(
        base.load(models.check_model(str(MODELS / name), {}), settings), adapter
    )
    ids = torch.tensor([[0, 287, 380, 312, 443, 279]])
    with torch.inference_mode():
        expected = with_adapter.eval()(input_ids=ids).logits
        found = base.load(merged, settings).eval()(input_ids=ids).logits
        with with_adapter.disable_adapter():
            without = with_adapter(input_ids=ids).logits
    # What is left is that the merged weights are in bfloat16.
    assert (found - expected).abs().mean() < 0.05 * (without - expected).abs().mean()
