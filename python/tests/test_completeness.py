"""Checkpoints that lack weights are refused, also where vLLM does not look."""

from typing import ClassVar

import pytest
import torch

from vllm_bridge import completeness


class Layer(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.scales = torch.nn.Parameter(torch.zeros(1))
        self.empty = torch.nn.Parameter(torch.zeros(0))
        self.quant_method: object = None


class Model(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer(), Layer()])
        self.head = Layer()


ALL = {f"layers.{index}.{name}" for index in range(3) for name in ("weight", "scales")}


def test_what_other_layers_have_must_be_there() -> None:
    completeness.check(Model(), ALL)
    with pytest.raises(ValueError, match=r"not initialized from checkpoint: layers\.1\.scales$"):
        completeness.check(Model(), ALL - {"layers.1.scales"})
    some = {"layers.0.weight", "layers.0.scales"}
    with pytest.raises(ValueError, match=r"layers\.1\.scales, .*layers\.2\.scales and 1 more$"):
        completeness.check(Model(), some)


def test_a_bias_must_be_there_where_its_weight_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    for layer in model.layers:
        layer.bias = torch.nn.Parameter(torch.zeros(2))
    completeness.check(model, ALL)  # those of a norm, say, which are zero
    monkeypatch.setattr("vllm.model_executor.layers.linear.LinearBase", Layer)
    with pytest.raises(ValueError, match=r"layers\.0\.bias"):
        completeness.check(model, ALL)
    completeness.check(model, ALL | {f"layers.{index}.bias" for index in range(3)})


def test_what_no_layer_has_may_have_values_of_its_own() -> None:
    completeness.check(Model(), {name for name in ALL if name.endswith("weight")})
    completeness.check(Model(), set())
    completeness.check(Model(), None)


def test_what_is_made_while_loading_is_not_missed() -> None:
    class Online:
        uses_meta_device = True

    model = Model()
    model.layers[1].quant_method = Online()
    completeness.check(model, ALL - {"layers.1.weight", "layers.1.scales"})


def test_vllms_loader_looks_at_what_the_model_says_it_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def load_weights(_self: object, model: Model, _config: object) -> None:
        # vLLM adds to the names what it does not want to look at.
        model.load_weights([]).update(ALL)

    monkeypatch.setattr(DefaultModelLoader, "load_weights", load_weights)
    completeness.install()
    wrapped = DefaultModelLoader.load_weights
    completeness.install()
    assert DefaultModelLoader.load_weights is wrapped

    class Whole(Model):
        lacks: ClassVar[set[str]] = set()

        def load_weights(self, _weights: object) -> set[str]:
            return ALL - self.lacks

    class Torn(Whole):
        lacks: ClassVar[set[str]] = {"layers.2.weight"}

    wrapped(None, Whole(), None)
    with pytest.raises(ValueError, match=r"layers\.2\.weight"):
        wrapped(None, Torn(), None)
